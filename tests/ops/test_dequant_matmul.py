"""Products on matrix tiles that decode the weight as they go."""

from __future__ import annotations

import pytest
import torch
from op_inputs import ISAS, close, delta, matrix, quantized

from qrosa import ops
from qrosa.ops import CsrOperands, NF4Operands, reference


@pytest.fixture(autouse=True)
def amx() -> None:
    if ops.status()["cpu"]["library"] is None or ops.force_cpu_isa(ISAS[-1]) != "amx":
        pytest.skip("this processor has no AMX")


def product(
    x: torch.Tensor, nf4: NF4Operands, csr: CsrOperands | None, shape: tuple[int, int], forward: bool, *rest: object
) -> torch.Tensor:
    return torch.ops.qrosa.dequant_matmul(x, *nf4, *(csr or (None, None, None)), *shape, forward, *rest)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 16, 300])
@pytest.mark.parametrize("shape", [(64, 64), (1, 128), (65, 192), (200, 576), (600, 640)])
@pytest.mark.parametrize("tokens", [1, 31, 33, 530])
def test_equals_the_fp64_reference(tokens: int, shape: tuple[int, int], rank: int, forward: bool) -> None:
    rows, columns = shape
    nf4, _, _ = quantized(rows, columns, nested=True)
    csr = delta(rows, columns, 0.02)
    depth, wide = (columns, rows) if forward else (rows, columns)
    x = matrix(tokens, depth, torch.bfloat16)
    left = matrix(tokens, rank, torch.bfloat16, 1) if rank else None
    right = matrix(rows, rank, torch.bfloat16, 2) if forward else matrix(rank, columns, torch.bfloat16, 2)
    bias = torch.randn(rows) if forward else None
    got = product(x, nf4, csr, shape, forward, left, right if rank else None, bias)
    # The weight is rounded to bf16 once, as dequant_add does it; everything after that is exact or fp32.
    weight = reference.effective_weight(nf4, csr, shape, torch.bfloat16).double()
    exact = x.double() @ (weight.t() if forward else weight)
    if left is not None:
        exact += left.double() @ (right.double().t() if forward else right.double())
    if bias is not None:
        exact += bias.double()
    assert got.shape == (tokens, wide)
    close(got, exact, torch.bfloat16, depth + rank + 1)


def test_plain_absmax_no_delta_and_an_empty_batch() -> None:
    nf4, _, _ = quantized(96, 128, nested=False)
    weight = reference.effective_weight(nf4, None, (96, 128), torch.bfloat16).double()
    x = matrix(40, 128, torch.bfloat16)
    close(product(x, nf4, None, (96, 128), True, None, None, None), x.double() @ weight.t(), torch.bfloat16, 128)
    assert product(x[:0], nf4, None, (96, 128), True, None, None, None).shape == (0, 96)


@pytest.mark.parametrize("forward", [True, False])
def test_bits_do_not_depend_on_threads(forward: bool) -> None:
    nf4, _, _ = quantized(640, 1088, nested=True)
    csr = delta(640, 1088, 0.05)
    x = matrix(70, 1088 if forward else 640, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(x, nf4, csr, (640, 1088), forward, None, None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("forward", [True, False])
def test_damaged_indices_are_refused(forward: bool) -> None:
    nf4, _, _ = quantized(96, 640, nested=True)
    csr = delta(96, 640, 0.2)
    x = matrix(40, 640 if forward else 96, torch.bfloat16)
    columns = csr.col.to(torch.int32)
    for bad in (
        csr._replace(col=torch.full_like(csr.col, 640)),
        csr._replace(col=columns.flip(0).to(torch.uint16)),
        csr._replace(row_ptr=csr.row_ptr + 100000),
        csr._replace(row_ptr=-csr.row_ptr),
    ):
        with pytest.raises(RuntimeError, match="outside the matrix"):
            product(x, nf4, bad, (96, 640), forward, None, None, None)


def test_opcheck_and_bad_inputs() -> None:
    nf4, _, _ = quantized(64, 64, nested=True)
    csr = delta(64, 64, 0.1)
    x, left = matrix(20, 64, torch.bfloat16), matrix(20, 3, torch.bfloat16)
    b = matrix(64, 3, torch.bfloat16)
    args = (x, *nf4, *csr, 64, 64, True, left, b, torch.ones(64))
    torch.library.opcheck(torch.ops.qrosa.dequant_matmul.default, args)
    for rest, message in (
        ((left, None, None), "together"),
        ((left, b[:63], None), "right"),
        ((left[:19], b, None), "left"),
        ((None, None, torch.ones(63)), "bias"),
    ):
        with pytest.raises(RuntimeError, match=message):
            product(x, nf4, csr, (64, 64), True, *rest)
    with pytest.raises(RuntimeError, match="x must be"):
        product(x.float(), nf4, csr, (64, 64), True, None, None, None)
    with pytest.raises(RuntimeError, match="do not cross rows"):
        product(matrix(20, 48, torch.bfloat16), quantized(64, 48, True)[0], None, (64, 48), True, None, None, None)
