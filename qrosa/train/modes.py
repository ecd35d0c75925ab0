"""How the model computes: which attention, and whether activations are kept or recomputed.

Checkpointing is the non-reentrant kind. The reentrant kind gives no gradient at all when a block's input needs none,
which is the case here: embeddings are frozen, so the first block's input is a constant.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute each decoder layer's activations in backward, or keep them."""
    hf = cast(Any, model)
    kwargs = {"use_reentrant": False}
    if hasattr(hf, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        if on:
            hf.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            hf.activation_checkpointing_disable()
    elif on:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        hf.gradient_checkpointing_disable()


def choose_attention(model: nn.Module, device: torch.device) -> None:
    """Eager attention on the CPU, transformers' own choice elsewhere."""
    hf = cast(Any, model)
    if device.type == "cpu" and hf.config._attn_implementation == "sdpa":
        hf.set_attn_implementation("eager")
