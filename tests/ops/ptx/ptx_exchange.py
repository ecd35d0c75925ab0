"""What lanes of a warp do together: shuffles, matrix loads and tensor-core products.

Each is a function of whole warps: values arrive as [warps, 32], a row a warp, and leave likewise.
Source: PTX ISA 9.0, 9.7.9.6 (shfl.sync), 9.7.14.5.15 (ldmatrix), 9.7.14.5.8 (mma.m16n8k16, 16-bit floats).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4
"""The ISA's groupID and threadID_in_group."""


def shuffled(values: NDArray, lane: NDArray, mode: str) -> NDArray:
    """What each lane receives: of lane ``lane`` (idx), or of the lane whose number differs in the bits of ``lane``."""
    sources = LANES ^ lane if mode == "bfly" else lane % 32
    return np.take_along_axis(values, np.broadcast_to(sources, values.shape), axis=1)


def loaded_matrices(rows: NDArray, transposed: bool) -> list[NDArray]:
    """ldmatrix.x4: rows [warps, 4 matrices, 8 rows, 8 elements] of 16 bits give four words a lane.

    Lane l receives of each matrix elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1), with ``.trans`` the elements
    with row and column exchanged; the first in the lower half.
    """
    first = (slice(None), 2 * MEMBER, GROUP) if transposed else (slice(None), GROUP, 2 * MEMBER)
    second = (slice(None), 2 * MEMBER + 1, GROUP) if transposed else (slice(None), GROUP, 2 * MEMBER + 1)
    words = []
    for matrix in range(4):
        elements = rows[:, matrix].astype(np.uint32)
        words.append(elements[first] | elements[second] << 16)
    return words


def _halves(words: NDArray, bf16: bool) -> tuple[NDArray, NDArray]:
    """The two 16-bit floats of each word in fp64, lower half first."""
    if bf16:
        return (words << 16).view(np.float32).astype(np.float64), (words & 0xFFFF0000).view(np.float32).astype(
            np.float64
        )
    pairs = np.ascontiguousarray(words).view(np.float16).reshape(*words.shape, 2).astype(np.float64)
    return pairs[..., 0], pairs[..., 1]


def product(a: list[NDArray], b: list[NDArray], c: list[NDArray], bf16: bool) -> list[NDArray]:
    """mma.m16n8k16: A [16, 16] of four words a lane, B [16, 8] of two, C [16, 8] of four fp32.

    A's word i holds row GROUP + 8 (i % 2), columns 2 MEMBER + 8 (i / 2) and the next; B's word i holds rows
    2 MEMBER + 8 i and the next of column GROUP; C's value i is at row GROUP + 8 (i / 2), column 2 MEMBER + i % 2.
    The sum is formed in fp64 and rounded once: a card may round more often.
    """
    warps = a[0].shape[0]
    left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for i, words in enumerate(a):
        for half, values in enumerate(_halves(words, bf16)):
            left[:, GROUP + 8 * (i % 2), 2 * MEMBER + 8 * (i // 2) + half] = values
    for i, words in enumerate(b):
        for half, values in enumerate(_halves(words, bf16)):
            right[:, 2 * MEMBER + 8 * i + half, GROUP] = values
    places = [(slice(None), GROUP + 8 * (i // 2), 2 * MEMBER + i % 2) for i in range(4)]
    for place, values in zip(places, c, strict=True):
        sums[place] = values
    result = (left @ right + sums).astype(np.float32)
    return [np.ascontiguousarray(result[place]) for place in places]
