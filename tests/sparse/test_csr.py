"""The CSR delta keeps its invariants and finds those that a file breaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrosa.errors import InputError
from qrosa.sparse.csr import CsrDelta, column_dtype


@given(rows=st.integers(1, 12), columns=st.integers(1, 40), seed=st.integers(0, 99), density=st.floats(0, 1))
def test_mask_positions_and_dense_agree(rows: int, columns: int, seed: int, density: float) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    delta = CsrDelta.from_mask(mask, torch.ones(int(mask.sum())))
    delta.check()
    assert torch.equal(delta.to_dense().bool(), mask)
    assert torch.equal(delta.positions(), mask.flatten().nonzero().flatten())
    assert delta.nnz == int(mask.sum())


def test_columns_beyond_signed_16_bits_survive() -> None:
    positions = torch.tensor([32767, 32768, 65535, 65536 + 40000])
    delta = CsrDelta.from_positions(positions, (2, 65536))
    assert delta.col.dtype == torch.uint16
    assert torch.equal(delta.positions(), positions)


def test_wide_matrices_use_32_bit_columns() -> None:
    assert column_dtype(65536) == torch.uint16 and column_dtype(65537) == torch.int32
    positions = torch.tensor([65536, 70000 + 69999])
    delta = CsrDelta.from_positions(positions, (2, 70000))
    assert torch.equal(delta.positions(), positions)


@pytest.mark.parametrize("positions", [[1, 1], [2, 1], [-1, 3], [0, 12]])
def test_positions_must_rise_within_the_matrix(positions: list[int]) -> None:
    with pytest.raises(InputError):
        CsrDelta.from_positions(torch.tensor(positions), (3, 4))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d.row_ptr.__setitem__(1, 9),
        lambda d: d.row_ptr.__setitem__(0, 1),
        lambda d: d.row_ptr.__setitem__(-1, 2),
        lambda d: setattr(d, "row_ptr", d.row_ptr.long()),
        lambda d: setattr(d, "col", d.col.int()),
        lambda d: setattr(d, "col", torch.tensor([3, 1, 2], dtype=torch.uint16)),
        lambda d: setattr(d, "col", torch.tensor([1, 9, 2], dtype=torch.uint16)),
        lambda d: setattr(d, "values", d.values[:2]),
        lambda d: setattr(d, "values", d.values.half()),
    ],
)
def test_check_finds_every_broken_invariant(break_it: object) -> None:
    delta = CsrDelta.from_positions(torch.tensor([1, 3, 6]), (2, 4))
    delta.check()
    break_it(delta)  # type: ignore[operator]
    with pytest.raises(InputError):
        delta.check()
