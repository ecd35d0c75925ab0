"""Every op on a card against the fp64 reference, over shapes that are multiples of nothing.

The kernels' index maps and synchronisation are proven without a card (test_tiling.py); this is the hardware's word.
"""

from __future__ import annotations

import pytest
import torch
from cuda_inputs import DEVICE, base, moved, needs_card, sparse
from op_inputs import FLOATS, ROUNDING, SUM_ERROR, bnb_dense, close, delta, matrix, quantized

from qrosa import ops
from qrosa.ops import reference

pytestmark = needs_card

SHAPES = ((1, 1), (3, 5), (7, 33), (64, 128), (130, 1000), (257, 1024), (96, 4096), (40, 14336))
DENSITIES = (None, 0.006, 0.1, 1.0)


def test_the_library_is_loaded() -> None:
    status = ops.status()["cuda"]
    assert status["library"] is not None, status["note"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequant_add_is_bit_equal(shape: tuple[int, int], density: float | None, dtype: torch.dtype) -> None:
    for nested in (True, False):
        (nf4, on_card), (csr, csr_on_card) = base(*shape, nested), sparse(*shape, density)
        out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
        ops.dequant_add(on_card, csr_on_card, out)
        assert torch.equal(out.cpu(), reference.effective_weight(nf4, csr, shape, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequant_add_from_misaligned_memory(dtype: torch.dtype) -> None:
    (nf4, on_card), (csr, csr_on_card) = base(33, 96), sparse(33, 96, 0.05)
    codes = torch.cat((on_card.codes[:1], on_card.codes))[1:]
    out = torch.empty(33 * 96 + 1, dtype=dtype, device=DEVICE)[1:].view(33, 96)
    ops.dequant_add(on_card._replace(codes=codes), csr_on_card, out)
    assert torch.equal(out.cpu(), reference.effective_weight(nf4, csr, (33, 96), dtype))


def test_dequant_add_equals_bitsandbytes() -> None:
    nf4, packed, state = quantized(320, 1024, nested=True)
    out = torch.empty(320, 1024, dtype=torch.bfloat16, device=DEVICE)
    ops.dequant_add(moved(nf4), None, out)
    assert torch.equal(out.cpu(), bnb_dense(packed, state, torch.bfloat16))


@pytest.mark.parametrize("way", ["gather", "tiles"])  # fp32 has only one
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.003, 0.1, 1.0])
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(1, (3, 5)), (7, (64, 128)), (65, (130, 1000)), (200, (257, 131)), (512, (96, 4096)), (2048, (520, 264))],
)
def test_sddmm(
    tokens: int,
    shape: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    way: str,
) -> None:
    assert ops.force_sddmm_way(way) == way
    rows, columns = shape
    csr, on_card = sparse(rows, columns, density)
    dy, x = matrix(tokens, rows, dtype, 1), matrix(tokens, columns, dtype, 2)
    got = ops.sddmm(dy.to(DEVICE), x.to(DEVICE), on_card.row_ptr, on_card.col)
    ops.force_sddmm_way("rule")
    assert got.dtype == torch.float32
    close(got.cpu(), reference.sddmm(dy.double(), x.double(), csr.row_ptr, csr.col), torch.float32, tokens)


def test_sddmm_past_column_65535_and_without_tokens() -> None:
    csr, on_card = sparse(4, 70000, 0.01)
    dy, x = matrix(65, 4, torch.bfloat16, 1), matrix(65, 70000, torch.bfloat16, 2)
    got = ops.sddmm(dy.to(DEVICE), x.to(DEVICE), on_card.row_ptr, on_card.col)
    close(got.cpu(), reference.sddmm(dy.double(), x.double(), csr.row_ptr, csr.col), torch.float32, 65)
    none = ops.sddmm(dy[:0].to(DEVICE), x[:0].to(DEVICE), on_card.row_ptr, on_card.col)
    assert not none.any() and none.shape == csr.col.shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [None, 0.006, 0.1])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 8, 9, 16, 21])
@pytest.mark.parametrize("shape", [(3, 5), (37, 96), (130, 1000), (66, 4096)])
def test_dequant_spmm(tokens: int, shape: tuple[int, int], density: float | None, dtype: torch.dtype) -> None:
    rows, columns = shape
    (nf4, on_card), (csr, csr_on_card) = base(rows, columns), sparse(rows, columns, density)
    x = matrix(tokens, columns, dtype)
    got = ops.dequant_spmm(x.to(DEVICE), on_card, csr_on_card, rows)
    assert got.dtype == dtype and got.shape == (tokens, rows)
    # On tensor cores a weight is the sum of two 16-bit floats, which leaves 2^-17 of it.
    close(got.cpu(), reference.dequant_spmm(x.double(), nf4, csr, rows), dtype, columns, 2.0 + 2.0**-17 / SUM_ERROR)


def test_dequant_spmm_does_not_round_the_weight() -> None:
    nf4, on_card = base(64, 512)
    for tokens in (1, 8):
        x = matrix(tokens, 512, torch.bfloat16)
        exact = reference.dequant_spmm(x.double(), nf4, None, 64)
        got = ops.dequant_spmm(x.to(DEVICE), on_card, None, 64).cpu()
        assert (got - exact).abs().max() <= exact.abs().max() * ROUNDING[torch.bfloat16] * 1.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("tokens", "shape"), [(1, (3, 5)), (33, (130, 129)), (150, (64, 1000)), (700, (257, 264))])
def test_score_accumulate(tokens: int, shape: tuple[int, int], square: bool, dtype: torch.dtype) -> None:
    dy, x = matrix(tokens, shape[0], dtype, 1), matrix(tokens, shape[1], dtype, 2)
    stat = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    got = stat.to(DEVICE, copy=True)
    ops.score_accumulate(dy.to(DEVICE), x.to(DEVICE), got, square)
    product = dy.double().t() @ x.double()
    exact = stat.double() + (product * product if square else product)
    size = 2.0 * (product.abs().max().item() + 1.0) if square else 1.0  # d(p^2) = 2 p dp
    close(got.cpu(), exact, torch.float32, tokens, size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2047, 70000])
def test_dropout_has_the_mask_of_the_cpu(count: int, dtype: torch.dtype) -> None:
    x = matrix(1, count, dtype)
    got = torch.ops.qrosa.dropout(x.to(DEVICE), 0.3, 12345)
    assert torch.equal(got.cpu(), torch.ops.qrosa.dropout(x, 0.3, 12345))


def test_opcheck() -> None:
    nf4, csr = moved(quantized(9, 64, nested=True)[0]), moved(delta(9, 64, 0.2))
    dy, x = matrix(7, 9, torch.bfloat16).to(DEVICE), matrix(7, 64, torch.bfloat16).to(DEVICE)
    out, stat = torch.empty(9, 64, dtype=torch.bfloat16, device=DEVICE), torch.zeros(9, 64, device=DEVICE)
    namespace = torch.ops.qrosa
    torch.library.opcheck(namespace.dequant_add.default, (*nf4, *csr, out))
    torch.library.opcheck(namespace.sddmm.default, (dy, x, csr.row_ptr, csr.col))
    torch.library.opcheck(namespace.dequant_spmm.default, (x, *nf4, *csr, 9))
    torch.library.opcheck(namespace.score_accumulate.default, (dy, x, stat, True))
    torch.library.opcheck(namespace.dropout.default, (x, 0.2, 3))


def test_bad_inputs_are_refused() -> None:
    nf4, csr = moved(quantized(9, 64, nested=True)[0]), moved(delta(9, 64, 0.2))
    dy, x = matrix(7, 9, torch.bfloat16).to(DEVICE), matrix(7, 64, torch.bfloat16).to(DEVICE)
    for call, message in (
        (lambda: ops.sddmm(dy[:6], x, csr.row_ptr, csr.col), "rows"),
        (lambda: ops.sddmm(dy.float(), x, csr.row_ptr, csr.col), "dtype"),
        (lambda: ops.sddmm(dy, x, csr.row_ptr.cpu(), csr.col), "another device"),
        (lambda: ops.sddmm(dy, x.t().contiguous().t(), csr.row_ptr, csr.col), "contiguous"),
        (lambda: ops.dequant_spmm(x, nf4, None, 10), "codes"),
        (lambda: ops.dequant_spmm(x[0], nf4, None, 9), "matrix"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_a_huge_batch_is_no_huge_grid() -> None:
    """More tokens than a grid has blocks along y: four a block, 65,535 blocks."""
    nf4, on_card = base(3, 33)
    x = matrix(262_141 + 5, 33, torch.float32)
    got = ops.dequant_spmm(x.to(DEVICE), on_card, None, 3)
    close(got.cpu(), reference.dequant_spmm(x.double(), nf4, None, 3), torch.float32, 33, 2.0)


def test_damaged_indices_stay_inside_memory() -> None:
    """Nothing can be raised without waiting for the card.

    compute-sanitizer shows that memory is safe, without torch's caching allocator, which packs tensors into one segment
    (``make gpu``).
    """
    nf4, csr = base(64, 256)[1], sparse(64, 256, 0.05)[1]
    dy, x = matrix(64, 64, torch.bfloat16).to(DEVICE), matrix(64, 256, torch.bfloat16).to(DEVICE)
    out = torch.empty(64, 256, dtype=torch.bfloat16, device=DEVICE)
    for broken in (csr._replace(row_ptr=csr.row_ptr + 10**6), csr._replace(col=torch.full_like(csr.col, 60000))):
        ops.dequant_add(nf4, broken, out)
        ops.sddmm(dy, x, broken.row_ptr, broken.col)
        ops.dequant_spmm(x[:8], nf4, broken, 64)
    torch.cuda.synchronize()
