"""How the model computes: attention, recomputation, what stays on the host.

Checkpointing is the non-reentrant kind. The reentrant kind gives no gradient at all when a block's input needs none,
which is the case here: embeddings are frozen, so the first block's input is a constant. transformers gives embeddings a
gradient because of that kind; here it would only cost: backward through the first block's input, and in mask selection
the input of every block below the ones that are observed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qrosa.model.attention import attention_name
from qrosa.model.unread import watch_unread_outputs
from qrosa.ops.products import widens
from qrosa.ops.recompute import contexts


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute each decoder layer's activations in backward, or keep them."""
    hf = cast(Any, model)
    kwargs = {"use_reentrant": False, "context_fn": contexts}
    if on:
        watch_unread_outputs(model)
    if hasattr(hf, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        if on:
            hf.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
            hf.disable_input_require_grads()
        else:
            hf.activation_checkpointing_disable()
    elif on:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        hf.gradient_checkpointing_disable()


def offload_activations(model: nn.Module, device: torch.device) -> None:
    """Keep what recomputation needs, each decoder layer's input, in host memory; checkpointing must be on."""
    from qrosa.offload.activations import ActivationOffload

    offload = ActivationOffload(device)
    cast(Any, model)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload.checkpoint)


def set_attention(model: nn.Module, kind: str, *, by_row: bool = False) -> None:
    """Use ``eager`` or ``sdpa`` attention, as the plan counted on; in fp32 where 16-bit products are not to be had.

    Args:
        model: The model.
        kind: ``eager`` or ``sdpa``.
        by_row: Packed micro-batches come, whose rows are kept apart.
    """
    hf = cast(Any, model)
    name = attention_name(kind, wide=widens(hf.get_input_embeddings().weight), by_row=by_row)
    if hf.config._attn_implementation != name:
        hf.set_attn_implementation(name)
