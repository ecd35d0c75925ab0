"""What a CUDA card does that tensors without data do not show: which attention kernel runs, and what kernels hide.

``scaled_dot_product_attention`` picks its kernel by device, and for ``meta`` tensors that would be the plain one with
its whole score matrix. ``qrosa.ops.card_attention`` makes the device's choice by hand.

Kernels also allocate inside, below what a dispatch mode can see. The few that matter have a formula each, from torch's
sources (``aten/src/ATen/native``: ``ReduceOps.cpp``, ``transformers/cuda/flash_attn/flash_api.cpp``,
``transformers/cuda/mem_eff_attention/kernel_backward.h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qrosa.ops.card_attention import FusedAttention, card_attention, cpu_attention
from qrosa.planner.bytes.activations import flash_backward_bytes

CARD_GRANULE = 512  # torch's CUDA allocator hands out multiples of this
_aten = torch.ops.aten
_ROUND = 128  # rows of a tile in both attention kernels
_FULL = 4  # bytes of fp32


@contextmanager
def fused_kernels(on_cpu: bool) -> Iterator[None]:
    """While inside, transformers' fused attention of ``meta`` tensors is the CPU's, or a card's of capability 8 on.

    transformers' ``sdpa`` function runs as it is, only the one torch function that it calls is replaced. This is done
    around each call and not around the whole step: autograd leaves function modes when it starts, and checkpointing
    runs attention again inside of it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = cpu_attention if on_cpu else card_attention

    def attend(*args: Any, **kwargs: Any) -> Any:
        with FusedAttention(kernel):
            return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what stood there before comes back


def hidden_bytes(func: Any, args: tuple[Any, ...], split: bool = False) -> int:
    """Bytes that an operator's kernel allocates and frees inside, on a card.

    Log-sum-exp: the shifted input, exponentiated in place. Flash attention's backward: see ``flash_backward_bytes``;
    ``split`` where it is strictly deterministic. The efficient kernel's backward: dQ in fp32 in whole tiles, and the
    row sums.
    """
    if func is _aten.logsumexp.default:
        return int(args[0].nbytes)
    if func is _aten._scaled_dot_product_flash_attention_backward.default:
        rows, heads, length, width = args[1].shape
        return flash_backward_bytes(rows, length, heads, args[2].shape[1], width, split)
    if func is _aten._scaled_dot_product_efficient_attention_backward.default:
        rows, heads, length, width = args[1].shape
        tile = _round_up(length, _ROUND) * _round_up(width, _ROUND // 2)
        return int(_FULL * rows * heads * (tile + _round_up(length, _ROUND)))
    return 0


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
