"""What a CUDA card does that tensors without data do not show: which attention kernel runs, and what kernels hide.

``scaled_dot_product_attention`` picks its kernel by device, and for ``meta`` tensors that would be the plain one with
its whole score matrix. A card takes flash attention where there is no mask and the memory-efficient kernel where there
is one; both keep the output and a log-sum-exp, and no scores. Here the same choice is made by hand, and the kernels'
own meta functions and derivatives then give what is saved.

Kernels also allocate inside, below what a dispatch mode can see. The few that matter have a formula each, from torch's
sources (``aten/src/ATen/native``: ``ReduceOps.cpp``, ``transformers/cuda/flash_attn/flash_api.cpp``,
``transformers/cuda/mem_eff_attention/kernel_backward.h``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CARD_GRANULE = 512  # torch's CUDA allocator hands out multiples of this
_aten = torch.ops.aten
_ROUND = 128  # rows of a tile in both attention kernels
_MASK_ALIGNMENT = 16  # elements; the efficient kernel reads masks whose rows start at multiples of this
_FULL = 4  # bytes of fp32


@contextmanager
def card_kernels() -> Iterator[None]:
    """While inside, transformers' fused attention on ``meta`` tensors is what a card of capability 8 or newer takes.

    transformers' ``sdpa`` function runs as it is, only the one torch function that it calls is replaced. This is done
    around each call and not around the whole step: autograd leaves function modes when it starts, and checkpointing
    runs attention again inside of it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(*args: Any, **kwargs: Any) -> Any:
        with _Replace():
            return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what stood there before comes back


class _Replace(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return card_attention(*args, **(kwargs or {}))
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
    if attn_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, zero, -math.inf)
    width = attn_mask.shape[-1]
    if width % _MASK_ALIGNMENT:
        attn_mask = functional.pad(attn_mask, (0, -width % _MASK_ALIGNMENT))[..., :width]
    attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], width)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )
    return efficient[0]  # type: ignore[no-any-return]


def hidden_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator's kernel allocates and frees inside, on a card.

    Log-sum-exp: the shifted input, exponentiated in place. Flash attention's backward: dQ summed in fp32, the row sums
    of dO * O, and dK and dV for every query head where keys are grouped. The efficient kernel's backward: dQ in fp32 in
    whole tiles, and the row sums.
    """
    if func is _aten.logsumexp.default:
        return int(args[0].nbytes)
    if func is _aten._scaled_dot_product_flash_attention_backward.default:
        return _flash_backward_bytes(args[1], args[2])
    if func is _aten._scaled_dot_product_efficient_attention_backward.default:
        rows, heads, length, width = args[1].shape
        tile = _round_up(length, _ROUND) * _round_up(width, _ROUND // 2)
        return int(_FULL * rows * heads * (tile + _round_up(length, _ROUND)))
    return 0


def _flash_backward_bytes(query: Tensor, key: Tensor) -> int:
    rows, heads, length, width = query.shape
    long, wide = _round_up(length, _ROUND), _round_up(width, 32)
    summed = _FULL * rows * heads * long * (wide + 1)
    grouped = key.shape[1] != heads
    expanded = 2 * query.element_size() * rows * heads * key.shape[2] * width if grouped else 0
    return int(summed + expanded)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
