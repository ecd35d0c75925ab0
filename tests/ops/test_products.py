"""Products in fp32 where 16-bit ones are slow: the same results, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qrosa.adapters.linear import QRosaLinear
from qrosa.model.head import Head
from qrosa.ops import products
from qrosa.ops.few_rows_head import OutputHead
from qrosa.quant.nf4 import NF4Weight
from qrosa.sparse.csr import CsrDelta
from qrosa.train.loss import chunked_loss


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with products.widening("cpu", True):
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_only_16_bits_are_widened() -> None:
    assert products.widens(torch.ones(1, dtype=torch.bfloat16)) and products.widens(torch.ones(1).half())
    assert not products.widens(torch.ones(1))
    assert not products.widens(torch.ones(1, dtype=torch.bfloat16, device="meta"))
    with products.widening("cpu", False):  # of fp16 the processor itself decides
        assert not products.widens(torch.ones(1, dtype=torch.bfloat16))
    assert products.widens(torch.ones(1).half())


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_a_head_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "HEAD_BLOCK", block)
    x, weight, bias = random(7, 33).bfloat16(), random(65, 33, seed=1).bfloat16(), random(65, seed=2)
    expected = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(products.linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    left = random(7, 65, seed=3)
    torch.testing.assert_close(
        products.product(left, weight).double(), left.double() @ weight.double(), rtol=1e-5, atol=1e-5
    )


def layer_of(dropout: float) -> QRosaLinear:
    layer = QRosaLinear(NF4Weight.quantize(random(96, 128), torch.bfloat16), None)
    layer.add_low_rank(8, alpha=16.0, dropout=dropout)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape, seed=4))
    layer.set_sparse(CsrDelta.from_mask(random(96, 128, seed=5) > 2))
    return layer.train()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_layer_is_that_of_fp32(dropout: float) -> None:
    """Output and every gradient are those of the same layer on fp32 inputs, rounded to bf16 at the end."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        layer, x = layer_of(dropout), random(3, 20, 128, seed=6).bfloat16().to(dtype).requires_grad_()
        y = layer(x)
        y.backward(random(3, 20, 96, seed=7).bfloat16().to(dtype))
        assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for narrow, exact in zip(*results, strict=True):
        error = (narrow.float() - exact.float()).norm() / exact.float().norm()
        assert error < 2**-8


def test_the_loss_is_that_of_fp32() -> None:
    head = nn.Linear(48, 300).bfloat16().requires_grad_(False)
    labels = torch.arange(40) % 300
    hidden = random(40, 48).bfloat16().requires_grad_()
    loss = chunked_loss(hidden, labels, head, chunk_tokens=16)
    loss.backward()
    exact = random(40, 48).bfloat16().double().requires_grad_()
    expected = nn.functional.cross_entropy(
        nn.functional.linear(exact, head.weight.double(), head.bias.double()), labels, reduction="sum"
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden.grad is not None and exact.grad is not None
    assert float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm()) < 2**-8


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_output_head(rows: int) -> None:
    head = OutputHead.of(nn.Linear(48, 300).bfloat16().requires_grad_(False))
    x = random(2, rows, 48).bfloat16()
    expected = nn.functional.linear(x.double(), head.weight.double(), head.bias.double())
    with torch.no_grad():
        assert float((head(x).double() - expected).norm() / expected.norm()) < 2**-8


def test_logits_are_not_rounded_on_the_way() -> None:
    head = Head(OutputHead.of(nn.Linear(48, 300).bfloat16().requires_grad_(False)), softcap=None, scale=1.0)
    x = random(7, 48).bfloat16()
    exact = nn.functional.linear(x.double(), head.layer.weight.double(), head.layer.bias.double())
    with products.widening("cpu", True), torch.no_grad():
        assert float((head.logits(x).double() - exact).norm() / exact.norm()) < 2**-20
    with products.widening("cpu", False), torch.no_grad():
        assert head.logits(x).dtype == torch.float32
