"""One W_eff for the op, the layer and the export, whatever the parts: each against the sum in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qrosa.adapters.compose import compose
from qrosa.adapters.inject import saved_parts
from qrosa.adapters.linear import QRosaLinear

N, K, R = 48, 80, 4
# fp32 arithmetic on numbers of size 1: a product of R terms, two sums and a rounding of 2^-24 each.
TOLERANCE = 2.0**-20


def layer_with(rank: int, density: float, seed: int = 0) -> QRosaLinear:
    torch.manual_seed(seed)
    mask = torch.rand(N, K) < density if density else None
    layer = QRosaLinear.from_linear(nn.Linear(K, N, bias=False), rank=rank, alpha=8, mask=mask)
    for parameter in layer.adapter_parameters().values():
        parameter.data.normal_(0, 0.3)
    return layer


def exact(layer: QRosaLinear) -> Tensor:
    """deq(Wq) + S + scale * B @ A in fp64, entry by entry where S is."""
    weight = layer.weight.dequantize(torch.float32).double()
    if layer.sparse_values is not None:
        for row in range(N):
            for place in range(int(layer.sparse_row_ptr[row]), int(layer.sparse_row_ptr[row + 1])):
                weight[row, int(layer.sparse_col[place])] += layer.sparse_values[place].double()
    if layer.low_rank is not None:
        weight += layer.low_rank.alpha / R * (layer.low_rank.B.double() @ layer.low_rank.A.double())
    return weight


@pytest.mark.parametrize("density", [0.0, 0.1])
@pytest.mark.parametrize("rank", [0, R])
def test_every_way_to_the_effective_weight_is_the_same(rank: int, density: float) -> None:
    layer = layer_with(rank, density)
    with torch.no_grad():
        want = exact(layer)
        trained = layer(torch.eye(K)).T  # Y = X W_eff^T, so the unit vectors give its columns
        state = {name: tensor.detach().clone() for name, tensor in layer.adapter_tensors().items()}
        parts = saved_parts("layer", state, (N, K), layer.alpha)
        merged = compose(layer.weight.dequantize(torch.float32), *parts)  # as the export does
        wide = compose(layer.weight.dequantize(torch.float32).double(), *parts)
    for got in (trained, merged, layer.effective_weight()):
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(wide, want, rtol=1e-14, atol=1e-14)


def test_the_weight_is_composed_in_place_and_the_parts_are_left_alone() -> None:
    layer = layer_with(R, 0.1)
    before = {name: tensor.detach().clone() for name, tensor in layer.adapter_tensors().items()}
    weight = torch.zeros(N, K)
    assert compose(weight, layer.low_rank, layer.sparse_delta()) is weight and weight.any()
    assert compose(torch.ones(N, K)).eq(1).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.adapter_tensors().items())
