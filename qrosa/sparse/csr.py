"""The sparse delta of one weight matrix, in compressed sparse rows.

Row pointers are int32. Columns are uint16 while K <= 65536, which covers every model up to some 70B and halves the
index's bytes; signed 16-bit columns, as the reference implementation has them, are wrong above 32767. Columns rise
within a row and no position stands twice, so the order of the values is the order of the flat positions: a mask can be
kept, sorted and compared as one int64 list. Values are fp32: folded into bf16, 1 to 9% of small updates round away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qrosa import ops
from qrosa.errors import InputError


def column_dtype(columns: int) -> torch.dtype:
    """The smallest index dtype that holds every column of a matrix with ``columns`` columns."""
    return torch.uint16 if columns <= 1 << 16 else torch.int32


@dataclass
class CsrDelta:
    """Positions and values of S for one weight matrix.

    Attributes:
        row_ptr: int32 [N + 1], where each row's entries start; the last entry is nnz.
        col: uint16 or int32 [nnz], rising within each row.
        values: fp32 [nnz].
        shape: (N out, K in).
    """

    row_ptr: Tensor
    col: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, values: Tensor | None = None) -> CsrDelta:
        """From a dense boolean mask [N, K]; values (default zero) in row-major order of the positions."""
        if mask.ndim != 2:
            raise InputError(
                f"a mask must be a matrix, got shape {tuple(mask.shape)}", "give one bool per weight, [N, K]"
            )
        positions = mask.bool().flatten().nonzero().flatten()
        return cls.from_positions(positions, (int(mask.shape[0]), int(mask.shape[1])), values)

    @classmethod
    def from_positions(cls, positions: Tensor, shape: tuple[int, int], values: Tensor | None = None) -> CsrDelta:
        """From flat positions ``row * K + column``.

        Args:
            positions: int64 [nnz], strictly rising, within N * K.
            shape: (N, K).
            values: fp32 [nnz], default zero.

        Raises:
            InputError: Positions out of order, repeated or outside the matrix; values of another length.
        """
        rows, columns = shape
        if positions.numel():
            rising = bool((positions[1:] > positions[:-1]).all())
            if not rising or int(positions[0]) < 0 or int(positions[-1]) >= rows * columns:
                raise InputError(
                    f"sparse positions are not sorted, distinct and within a {rows} x {columns} matrix",
                    "make the mask again for this base",
                )
        row = torch.div(positions, columns, rounding_mode="floor")
        row_ptr = torch.zeros(rows + 1, dtype=torch.int32, device=positions.device)
        row_ptr[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        col = (positions - row * columns).to(column_dtype(columns))
        if values is None:
            values = torch.zeros(positions.numel(), dtype=torch.float32, device=positions.device)
        delta = cls(row_ptr, col, values.to(torch.float32), shape)
        if delta.values.shape != col.shape:
            raise InputError(f"{delta.values.numel()} values for {col.numel()} positions", "give one value a position")
        return delta

    def positions(self) -> Tensor:
        """Flat positions, int64 [nnz], rising."""
        rows, columns = self.shape
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        row = torch.repeat_interleave(torch.arange(rows, device=self.row_ptr.device), counts)
        return row * columns + self.col.long()

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S as a dense matrix [N, K]; for merging and tests, one matrix at a time."""
        dense = torch.zeros(self.shape[0] * self.shape[1], dtype=dtype, device=self.values.device)
        dense[self.positions()] = self.values.detach().to(dtype)
        return dense.view(self.shape)

    def check(self) -> None:
        """Verify every invariant of the layout; used on whatever comes from a file.

        Raises:
            InputError: Names the invariant that does not hold.
        """
        rows, columns = self.shape
        hint = "the adapter file is damaged or made for another model; take another copy"
        if self.row_ptr.dtype != torch.int32 or self.row_ptr.shape != (rows + 1,):
            raise InputError(f"sparse row pointers are not int32 [{rows + 1}]", hint)
        if self.col.dtype != column_dtype(columns) or self.values.dtype != torch.float32:
            raise InputError(
                f"sparse columns or values have a wrong dtype ({self.col.dtype}, {self.values.dtype})", hint
            )
        counts = self.row_ptr[1:].long() - self.row_ptr[:-1].long()
        starts_and_ends = int(self.row_ptr[0]) == 0 and int(self.row_ptr[-1]) == self.nnz
        if not starts_and_ends or bool((counts < 0).any()) or self.values.shape != self.col.shape:
            raise InputError("sparse row pointers do not match the number of values", hint)
        positions = self.positions()
        if bool((self.col.long() >= columns).any()) or bool((positions[1:] <= positions[:-1]).any()):
            raise InputError(f"sparse columns are not rising within {columns} columns", hint)

    @property
    def nnz(self) -> int:
        """Number of positions."""
        return self.col.numel()

    @property
    def density(self) -> float:
        """Share of the matrix that has a sparse value."""
        return self.nnz / (self.shape[0] * self.shape[1])

    def operands(self) -> ops.CsrOperands:
        """The tensors in the order that the ops take them."""
        return ops.CsrOperands(self.row_ptr, self.col, self.values)
