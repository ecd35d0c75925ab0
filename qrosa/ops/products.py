"""Matrix products of 16-bit floats on processors that are slow at them (``qrosa.processor`` says which).

On one without AVX-512 the logits' gradient [254, 49152] x [49152, 576] takes 38 s on one core, and 0.1 s in fp32. So
there everything that multiplies does so in fp32: a quantised layer widens its inputs and decodes its weight to fp32,
attention widens queries, keys and values, and the head, whose weight stays in 16 bits, is widened in blocks. Results
are rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qrosa.processor import HEAD_BLOCK, widens_products

_widening: set[str] = set()  # device types


def widens(tensor: Tensor) -> bool:
    """Whether products of ``tensor`` have to be taken in fp32."""
    slow = tensor.device.type in _widening
    if tensor.dtype == torch.float16:
        return slow or (tensor.is_cpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return slow and tensor.dtype == torch.bfloat16


@contextmanager
def widening(device: str, on: bool) -> Iterator[None]:
    """While inside, 16-bit products on ``device`` (a type, as ``cpu``) are taken in fp32, or are not."""
    before = set(_widening)
    (_widening.add if on else _widening.discard)(device)
    try:
        yield
    finally:
        _widening.clear()
        _widening.update(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias as fp32 [n, V], of x [n, d] and a weight [V, d] in 16 bits that is never whole in fp32."""
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    wide = x.float()
    for rows in _blocks(weight):
        torch.mm(wide, weight[rows].float().t(), out=out[:, rows])
    return out if bias is None else out.add_(bias)


def product(left: Tensor, weight: Tensor) -> Tensor:
    """left W as fp32 [n, d], of fp32 left [n, V] and the same kind of weight [V, d]."""
    out = left.new_zeros((left.shape[0], weight.shape[1]))
    for rows in _blocks(weight):
        out.addmm_(left[:, rows], weight[rows].float())
    return out


def _blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, HEAD_BLOCK // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


if widens_products():
    _widening.add("cpu")
