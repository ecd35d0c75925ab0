"""The whole layer on matrix tiles: products that decode as they go, thin products and masks beside them."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_inputs import ISAS, SUM_ERROR, close, delta, matrix, quantized

from qrosa import ops
from qrosa.ops import CsrOperands, NF4Operands, reference
from qrosa.ops.dropout import dropout

Tensors = tuple[torch.Tensor, ...]
NO_DELTA = (None, None, None)


@pytest.fixture(autouse=True)
def amx() -> None:
    if ops.status()["cpu"]["library"] is None or ops.force_cpu_isa(ISAS[-1]) != "amx":
        pytest.skip("this processor has no AMX")


def forward(
    x: torch.Tensor, nf4: NF4Operands, csr: CsrOperands | None, n: int, low_rank: Tensors | None = None,
    bias: torch.Tensor | None = None, p: float = 0.0,
) -> Tensors:  # fmt: skip
    a, b = low_rank or (None, None)
    return torch.ops.qrosa.linear_tiles(x, *nf4, n, bias, *(csr or NO_DELTA), a, b, 0.5, p, 7)


def backward(
    dy: torch.Tensor, x: torch.Tensor, projected: torch.Tensor, nf4: NF4Operands, csr: CsrOperands | None,
    low_rank: Tensors | None = None, p: float = 0.0, needs: tuple[bool, ...] = (True,) * 4,
) -> Tensors:  # fmt: skip
    a, b = low_rank or (None, None)
    return torch.ops.qrosa.linear_tiles_backward(dy, x, projected, *nf4, *(csr or NO_DELTA), a, b, 0.5, p, 7, *needs)


def layer(tokens: int, n: int, k: int, rank: int) -> tuple[Tensors, NF4Operands, CsrOperands, Tensors | None]:
    tensors = (matrix(tokens, k, torch.bfloat16), matrix(tokens, n, torch.bfloat16, 1))
    low_rank = None
    if rank:
        low_rank = (
            (matrix(rank, k, torch.bfloat16, 2) * k**-0.5).bfloat16(),
            (matrix(n, rank, torch.bfloat16, 3) * rank**-0.5).bfloat16(),
        )
    return tensors, quantized(n, k, nested=True)[0], delta(n, k, 0.02), low_rank


RANKS = ((0, 0.0), (1, 0.0), (16, 0.0), (16, 0.2), (33, 0.2), (256, 0.1), (300, 0.0))  # with the dropout beside each


@pytest.mark.parametrize("shape", [(64, 64), (1, 128), (65, 192), (200, 576), (600, 640)])
@pytest.mark.parametrize("tokens", [1, 31, 33, 530])
def test_equals_the_fp64_reference(tokens: int, shape: tuple[int, int]) -> None:
    for rank, p in RANKS:
        check(tokens, shape, rank, p)


def check(tokens: int, shape: tuple[int, int], rank: int, p: float) -> None:
    n, k = shape
    (x, dy), nf4, csr, low_rank = layer(tokens, n, k, rank)
    bias = torch.randn(n)
    y, projected = forward(x, nf4, csr, n, low_rank, bias, p)
    dx, dvalues, da, db = backward(dy, x, projected, nf4, csr, low_rank, p)
    # What is rounded on the way is taken as rounded: the weight once, as dequant_add does it, and the thin products.
    weight = reference.effective_weight(nf4, csr, shape, torch.bfloat16).double()
    x, dy = x.double(), dy.double()
    want_y, want_dx = x @ weight.t() + bias.double(), dy @ weight
    close(dvalues, reference.sddmm(dy, x, csr.row_ptr, csr.col), torch.float32, tokens)
    if low_rank is not None:
        a, b = (t.double() for t in low_rank)
        mask = dropout(torch.ones_like(x), p, 7)
        close(projected, (mask * x) @ a.t(), torch.bfloat16, k)
        inner = 0.5 / (1 - p) * (dy @ b)
        want_y += (projected.double() * 0.5).bfloat16().double() @ b.t()
        want_dx += (mask * (1 - p)).round() * (inner.bfloat16().double() @ a)
        # inner is rounded out of our sight: where fp32 and fp64 sums round apart, a term moves by a bf16 unit.
        apart = int(2.0**-8 * inner.abs().max().item() * max(x.abs().max().item(), a.abs().max().item()) / SUM_ERROR)
        close(da, inner.bfloat16().double().t() @ ((mask * (1 - p)).round() * x), torch.bfloat16, tokens + apart)
        close(db, 0.5 * dy.t() @ projected.double(), torch.bfloat16, tokens)
    else:
        apart = 0
    assert projected.shape == ((tokens, rank) if rank else (0,))
    close(y, want_y, torch.bfloat16, k + rank + 1)
    close(dx, want_dx, torch.bfloat16, n + rank + 1 + apart)


def test_small_parts_survive_one_rounding() -> None:
    """A low-rank product far below half a unit in the last place of y still moves y as often as it should."""
    (x, _), nf4, _, low_rank = layer(512, 64, 128, 4)
    assert low_rank is not None
    a, b = low_rank[0], low_rank[1] * 2.0**-7
    y, projected = forward(x, nf4, None, 64, (a, b))
    wide = x.double() @ reference.effective_weight(nf4, None, (64, 128), torch.bfloat16).double().t()
    part = 0.5 * projected.double() @ b.double().t()
    found = ((y.double() - wide) * part).sum() / part.square().sum()
    assert 0.8 < found < 1.2


def test_plain_absmax_without_adapters() -> None:
    nf4, _, _ = quantized(96, 128, nested=False)
    weight = reference.effective_weight(nf4, None, (96, 128), torch.bfloat16).double()
    x = matrix(40, 128, torch.bfloat16)
    y, projected = forward(x, nf4, None, 96)
    close(y, x.double() @ weight.t(), torch.bfloat16, 128)
    assert projected.numel() == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bits_do_not_depend_on_threads(p: float) -> None:
    (x, dy), nf4, csr, low_rank = layer(600, 640, 1088, 20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):  # few threads pack X each for itself, more share one copy
            torch.set_num_threads(threads)
            y, projected = forward(x, nf4, csr, 640, low_rank, None, p)
            results.append((y, *backward(dy, x, projected, nf4, csr, low_rank, p)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_only_the_gradients_asked_for() -> None:
    (x, dy), nf4, csr, low_rank = layer(40, 96, 128, 5)
    _, projected = forward(x, nf4, csr, 96, low_rank)
    full = backward(dy, x, projected, nf4, csr, low_rank)
    for needs in itertools.product((False, True), repeat=4):
        found = backward(dy, x, projected, nf4, csr, low_rank, needs=needs)
        for need, got, want in zip(needs, found, full, strict=True):
            assert torch.equal(got, want) if need else got.numel() == 0, needs


def test_damaged_indices_are_refused() -> None:
    (x, dy), nf4, csr, _ = layer(40, 96, 640, 0)
    for bad in (
        csr._replace(col=torch.full_like(csr.col, 640)),
        csr._replace(row_ptr=csr.row_ptr + 100000),
        csr._replace(row_ptr=-csr.row_ptr),
    ):
        with pytest.raises(RuntimeError, match="outside the matrix"):
            forward(x, nf4, bad, 96)
        with pytest.raises(RuntimeError, match="outside the matrix"):
            backward(dy, x, x[:0], nf4, bad, needs=(True, False, False, False))
    with pytest.raises(RuntimeError, match="row_ptr"):
        backward(dy, x, x[:0], nf4, csr._replace(row_ptr=csr.row_ptr + 1), needs=(False, True, False, False))


def test_opcheck_and_bad_inputs() -> None:
    (x, dy), nf4, csr, low_rank = layer(20, 64, 64, 3)
    assert low_rank is not None
    a, b = low_rank
    args = (x, *nf4, 64, torch.ones(64), *csr, a, b, 0.5, 0.1, 3)
    torch.library.opcheck(torch.ops.qrosa.linear_tiles.default, args)
    projected = forward(x, nf4, csr, 64, low_rank)[1]
    args = (dy, x, projected, *nf4, *csr, a, b, 0.5, 0.1, 3, True, False, True, True)
    torch.library.opcheck(torch.ops.qrosa.linear_tiles_backward.default, args)
    for low, bias, p, message in (
        ((a, None), None, 0.0, "together"),
        ((a, b[:63]), None, 0.0, "b must be"),
        ((a[:, :63], b), None, 0.0, "a must be"),
        (None, torch.ones(63), 0.0, "bias"),
        (None, None, 1.0, "dropout"),
        ((matrix(300, 64, torch.bfloat16), matrix(64, 300, torch.bfloat16)), None, 0.1, "rank"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(x, nf4, csr, 64, low, bias, p)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="x must be"):
        forward(x.float(), nf4, None, 64)
    with pytest.raises(RuntimeError, match="no tokens"):
        forward(x[:0], nf4, None, 64)
    with pytest.raises(RuntimeError, match="do not cross rows"):
        forward(matrix(20, 48, torch.bfloat16), quantized(64, 48, True)[0], None, 64)
