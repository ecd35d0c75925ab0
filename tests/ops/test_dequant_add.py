"""NF4 to dense: bitsandbytes' bits without a delta, the reference's bits with one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import FLOATS, bnb_dense, delta, densities, quantized, seeds, sizes

from qrosa import ops
from qrosa.ops import reference

isa_is_fixed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),  # half a byte
        (7, 63),  # blocks that cross rows at every place
        (48, 80),  # rows of a multiple of 16 and not of a block
        (48, 128),  # whole blocks
        (64, 576),  # more blocks than one nested scale covers
        (3, 70001),  # rows wider than 16 bits, of an odd length
    ],
)
def test_equals_bitsandbytes_to_the_bit(isa: str, shape: tuple[int, int]) -> None:
    for nested, dtype in itertools.product((True, False), FLOATS):
        nf4, packed, state = quantized(*shape, nested)
        out = torch.empty(shape, dtype=dtype)
        ops.dequant_add(nf4, None, out)
        assert torch.equal(out, bnb_dense(packed, state, dtype)), (nested, dtype)


@isa_is_fixed
@given(rows=sizes, columns=sizes, nested=st.booleans(), density=densities, dtype=st.sampled_from(FLOATS), seed=seeds)
def test_equals_the_reference_to_the_bit(
    isa: str, rows: int, columns: int, nested: bool, density: float, dtype: torch.dtype, seed: int
) -> None:
    nf4, _, _ = quantized(rows, columns, nested, seed)
    csr = delta(rows, columns, density, seed)
    out, expected = torch.full((2, rows, columns), float("nan"), dtype=dtype)
    ops.dequant_add(nf4, csr, out)
    reference.dequant_add(nf4, csr, expected)
    assert torch.equal(out, expected)


def test_the_delta_is_added_before_the_rounding(isa: str) -> None:
    nf4, _, _ = quantized(4, 64, nested=True)
    csr = delta(4, 64, 1.0)
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    ops.dequant_add(nf4, csr, out)
    exact = reference.effective_weight(nf4, csr, (4, 64), torch.float64)
    assert torch.all((out.double() - exact).abs() <= exact.abs() * 2.0**-7.99)


def test_columns_past_32767_and_past_65535(isa: str) -> None:
    for columns in (40000, 70000):
        nf4, _, _ = quantized(2, columns, nested=True)
        csr = delta(2, columns, 0.01)
        assert int(csr.col.to(torch.int64).max()) > 32767
        out, expected = torch.empty(2, 2, columns)
        ops.dequant_add(nf4, csr, out)
        reference.dequant_add(nf4, csr, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes(isa: str, block_size: int) -> None:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(48, 256), quant_type="nf4", blocksize=block_size)
    nf4 = ops.NF4Operands(packed.flatten(), state.absmax, None, None, None, block_size)
    out = torch.empty(48, 256)
    ops.dequant_add(nf4, None, out)
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))


def test_opcheck(isa: str) -> None:
    for csr in (None, delta(6, 64, 0.1)):
        nf4, _, _ = quantized(6, 64, nested=True)
        args = (*nf4, *(csr or (None, None, None)), torch.empty(6, 64, dtype=torch.bfloat16))
        torch.library.opcheck(torch.ops.qrosa.dequant_add.default, args)


def test_bad_inputs_are_refused(isa: str) -> None:
    nf4, _, _ = quantized(6, 64, nested=True)
    csr = delta(6, 64, 0.2)
    out = torch.empty(6, 64)
    for bad, message in (
        (nf4._replace(codes=nf4.codes[:-1]), "codes"),
        (nf4._replace(absmax=nf4.absmax[:-1]), "absmax"),
        (nf4._replace(absmax_scale=None), "together"),
        (nf4._replace(block_size=48), "power of two"),
        (nf4._replace(codes=nf4.codes.to(torch.int8)), "codes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dequant_add(bad, None, out)
    for changed, message in (
        (csr._replace(values=csr.values[:-1]), "values"),
        (csr._replace(col=csr.col.to(torch.int32)), "col"),
        (csr._replace(row_ptr=csr.row_ptr[:-1]), "row_ptr"),
        (csr._replace(col=torch.full_like(csr.col, 64)), "outside the matrix"),
        (csr._replace(row_ptr=csr.row_ptr + 1000), "outside the matrix"),
        (csr._replace(row_ptr=-csr.row_ptr), "outside the matrix"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dequant_add(nf4, changed, out)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.dequant_add(nf4, None, torch.empty(64, 6).t())
