"""Attention in fp32, for processors whose 16-bit products are slow (``qrosa.ops.products``).

transformers asks a registry for the attention function by name. The two registered here widen queries, keys and values,
call what transformers would have called, and round the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def wide_attention(kind: str) -> str:
    """The name under which transformers finds ``eager`` or ``sdpa`` in fp32."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"{kind}_in_fp32"
    AttentionInterface.register(name, _eager if kind == "eager" else _sdpa)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name


def _eager(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    # Each family has its own, beside its attention class: capped scores, sinks.
    here = sys.modules[type(module).__module__]
    return _in_fp32(here.eager_attention_forward, module, *tensors, **settings)


def _sdpa(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    from transformers import AttentionInterface

    return _in_fp32(AttentionInterface()["sdpa"], module, *tensors, **settings)


def _in_fp32(
    function: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    output, scores = function(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return output.to(query.dtype), scores
