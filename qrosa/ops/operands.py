"""What the ops take: a frozen 4-bit matrix and a sparse delta, as plain tuples of tensors.

The tuples carry no behaviour, so that an op's schema is a flat list of tensors (which is all that the
dispatcher, fake tensors and CUDA graphs understand) while Python callers pass two arguments instead of nine.
``qrosa.quant.NF4Weight`` and ``qrosa.sparse.CsrDelta`` own the invariants; the ops check what keeps them in bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 NF4 values (QLoRA, arXiv 2305.14314, appendix E): code c stands for NF4_TABLE[c] * absmax of its block.
The same table stands in ``csrc/nf4.h``; a test holds the two together."""

NESTED_BLOCK = 256
"""Blocks of absmax that share one scale, when the absmax is itself quantised."""

MAX_UINT16_COLUMNS = 65536
"""Matrices of at most this many columns store column indices as uint16, wider ones as int32."""


class NF4Operands(NamedTuple):
    """An NF4 matrix [N, K] in bitsandbytes' layout.

    Element 2i of the flat [N * K] array is the high nibble of byte i. Blocks of ``block_size`` run over the flat
    array and may cross rows. With a nested absmax, block b has
    ``absmax_code[absmax[b]] * absmax_scale[b // 256] + absmax_offset``, in fp32 with two roundings.
    """

    codes: torch.Tensor
    """uint8 [ceil(N * K / 2)]"""
    absmax: torch.Tensor
    """uint8 [blocks] if nested, else fp32 [blocks]"""
    absmax_code: torch.Tensor | None
    """fp32 [256]"""
    absmax_scale: torch.Tensor | None
    """fp32 [ceil(blocks / 256)]"""
    absmax_offset: torch.Tensor | None
    """fp32 []"""
    block_size: int


NO_DELTA = (None, None, None)
"""What stands in an op's flat arguments where there is no delta."""


class CsrOperands(NamedTuple):
    """A sparse delta [N, K] in compressed rows, columns ascending within a row."""

    row_ptr: torch.Tensor
    """int32 [N + 1]"""
    col: torch.Tensor
    """uint16 [nnz] where K <= 65536, else int32 [nnz]"""
    values: torch.Tensor
    """fp32 [nnz]"""
