"""The whole layer on a card: gradients, CUDA graphs, no waiting, the same bits twice, the right one of two cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_inputs import DEVICE, base, moved, needs_card, sparse
from op_inputs import matrix

from qrosa import ops
from qrosa.ops import CsrOperands, NF4Operands, reference

pytestmark = needs_card

TOKENS, ROWS, COLUMNS, RANK = 130, 264, 320, 8


def parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """x, dy and the trainable tensors, on the CPU."""
    return {
        "x": matrix(TOKENS, COLUMNS, dtype, 1),
        "dy": matrix(TOKENS, ROWS, dtype, 2),
        "a": matrix(RANK, COLUMNS, dtype, 3) * 0.1,
        "b": matrix(ROWS, RANK, dtype, 4) * 0.1,
        "values": sparse(ROWS, COLUMNS, 0.006)[0].values,
    }


def step(
    nf4: NF4Operands, csr: CsrOperands, tensors: dict[str, torch.Tensor], dropout: float = 0.05
) -> Callable[[], list[torch.Tensor]]:
    """A function that runs the layer forward and backward: y and the gradients of x, a, b and the sparse values."""
    leaves = [tensors[name].requires_grad_() for name in ("x", "a", "b", "values")]

    def run() -> list[torch.Tensor]:
        x, a, b, values = leaves
        y = ops.linear(x, nf4, ROWS, None, csr._replace(values=values), a, b, 2.0, dropout, 7)
        return [y, *torch.autograd.grad(y, leaves, tensors["dy"])]

    return run


def on_card(device: torch.device = DEVICE, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.05):  # type: ignore[no-untyped-def]
    tensors = {name: tensor.to(device) for name, tensor in parameters(dtype).items()}
    nf4, csr = moved(base(ROWS, COLUMNS)[0], device), moved(sparse(ROWS, COLUMNS, 0.006)[0], device)
    return step(nf4, csr, tensors, dropout)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Turns every wait of the host for the card into an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_gradients_against_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest element; W_eff and the low-rank part are rounded to dtype on the way."""
    got = on_card(dtype=dtype, dropout=0.0)()
    wide = {name: tensor.double() for name, tensor in parameters(dtype).items()}
    leaves = [wide[name].requires_grad_() for name in ("x", "a", "b", "values")]
    csr = sparse(ROWS, COLUMNS, 0.006)[0]._replace(values=leaves[3])
    y = reference.linear(leaves[0], base(ROWS, COLUMNS)[0], ROWS, None, csr, leaves[1], leaves[2], 2.0)
    exact = [y, *torch.autograd.grad(y, leaves, wide["dy"])]
    for one, other in zip(got, exact, strict=True):
        assert (one.cpu().double() - other).abs().max() <= tolerance * other.abs().max()


def test_the_same_bits_twice() -> None:
    run = on_card()
    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_dropout_is_the_same_on_both_devices() -> None:
    host, card = on_card(torch.device("cpu"), torch.float32, 0.5)(), on_card(DEVICE, torch.float32, 0.5)()
    for one, other in zip(card, host, strict=True):
        assert (one.cpu() - other).abs().max() <= 2e-5 * other.abs().max()


def test_nothing_waits_for_the_card() -> None:
    run = on_card()
    run()
    stat, x = torch.zeros(ROWS, COLUMNS, device=DEVICE), torch.randn(3, COLUMNS, device=DEVICE)
    nf4 = base(ROWS, COLUMNS)[1]
    torch.cuda.synchronize()
    with no_waiting():
        run()
        ops.score_accumulate(torch.randn(3, ROWS, device=DEVICE), x, stat, True)
        with torch.no_grad():
            ops.linear(x, nf4, ROWS)


def test_forward_and_backward_in_a_cuda_graph() -> None:
    run = on_card()
    expected = [tensor.clone() for tensor in run()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # warms up cuBLAS and the allocator away from the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):  # cuBLAS may choose otherwise while capturing
        assert (one.float() - other.float()).abs().max() <= 1e-2 * other.abs().max()


def test_a_side_stream_is_used() -> None:
    """The kernels run where the caller's work runs: after a long wait on a side stream they see what it wrote."""
    nf4, csr = base(ROWS, COLUMNS)[1], sparse(ROWS, COLUMNS, 0.01)[1]
    out = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
    values = torch.zeros_like(csr.values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        values.copy_(csr.values)
        ops.dequant_add(nf4, csr._replace(values=values), out)
    side.synchronize()
    expected = torch.empty_like(out)
    ops.dequant_add(nf4, csr, expected)
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_tensors_decide_the_card_not_the_current_one() -> None:
    second = torch.device("cuda", 1)
    with torch.cuda.device(0):
        got = on_card(second)()
        assert torch.cuda.current_device() == 0
    for one, other in zip(got, on_card()(), strict=True):
        assert one.device == second
        assert (one.cpu().float() - other.cpu().float()).abs().max() <= 1e-2 * other.abs().max().item()
    with pytest.raises(RuntimeError, match="another device"):
        ops.dequant_add(base(4, 64)[1], None, torch.empty(4, 64, device=second))
