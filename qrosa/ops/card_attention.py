"""Fused attention of ``meta`` tensors by the kernel that a card, or the CPU, would take.

torch takes the plain kernel for them, with its whole score matrix. A card takes flash attention where there is no mask
and the memory-efficient kernel where there is one, the CPU a flash kernel of its own for both; all keep the output and
a log-sum-exp, and no scores. Here the same choice is made by hand, and the kernels' own meta functions and derivatives
then give what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_MASK_ALIGNMENT = 16  # elements; the efficient kernel reads masks whose rows start at multiples of this


class FusedAttention(TorchFunctionMode):
    """While inside, ``scaled_dot_product_attention`` on ``meta`` tensors is ``kernel``: a card's or the CPU's."""

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return self._kernel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def card_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention, [B, heads, L, D], by the kernel that a card would take.

    Without a mask flash attention, which reads grouped keys and values as they are; with one the memory-efficient
    kernel, for which a yes/no mask becomes one of the queries' dtype, padded to whole aligned rows.
    """
    if attn_mask is None:
        flash = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        return flash[0]  # type: ignore[no-any-return]
    attn_mask = _added(attn_mask, query)
    width = attn_mask.shape[-1]
    if width % _MASK_ALIGNMENT:
        attn_mask = functional.pad(attn_mask, (0, -width % _MASK_ALIGNMENT))[..., :width]
    attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], width)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )
    return efficient[0]  # type: ignore[no-any-return]


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same by the CPU's kernel, which reads grouped keys and values as they are; a mask is added to the scores."""
    mask = None if attn_mask is None else _added(attn_mask, query)
    flash = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
    )
    return flash[0]  # type: ignore[no-any-return]


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A yes/no mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), -math.inf)
