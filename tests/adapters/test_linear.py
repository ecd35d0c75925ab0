"""The quantised layer equals the dense composition of its parts, forward and backward, and keeps its dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qrosa.adapters.linear import QRosaLinear
from qrosa.errors import InputError
from qrosa.sparse.csr import CsrDelta

N, K, R = 48, 80, 4


def make_layer(rank: int = R, density: float = 0.1, bias: bool = True, dropout: float = 0.0) -> QRosaLinear:
    torch.manual_seed(3)
    mask = torch.rand(N, K) < density if density else None
    layer = QRosaLinear.from_linear(nn.Linear(K, N, bias=bias), rank=rank, alpha=8, dropout=dropout, mask=mask)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_(0, 0.1)
    return layer


@pytest.mark.parametrize("rank", [0, R])
@pytest.mark.parametrize("density", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_composition(rank: int, density: float, bias: bool) -> None:
    layer = make_layer(rank, density, bias)
    x = torch.randn(2, 5, K, requires_grad=True)
    y = layer(x)
    dense = layer.effective_weight()
    reference_x = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(reference_x, dense, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_adapter_equal_autograd_through_the_dense_weight() -> None:
    layer = make_layer()
    x, upstream = torch.randn(7, K), torch.randn(7, N)
    layer(x).backward(upstream)
    a, b = (factor.detach().float().requires_grad_() for factor in layer.low_rank.factors())
    delta = layer.sparse_delta()
    s = delta.to_dense().requires_grad_()
    dense = layer.weight.dequantize(torch.float32) + s + layer.low_rank.scale * b @ a
    nn.functional.linear(x, dense, layer.bias).backward(upstream)
    torch.testing.assert_close(layer.sparse_values.grad, s.grad.flatten()[delta.positions()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.low_rank.A.grad.float(), a.grad, rtol=2e-2, atol=2e-2)  # bf16 gradients
    torch.testing.assert_close(layer.low_rank.B.grad.float(), b.grad, rtol=2e-2, atol=2e-2)


def test_a_new_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(K, N)
    x = torch.randn(3, K)
    bare = QRosaLinear.from_linear(dense)(x)
    adapted = QRosaLinear.from_linear(dense, rank=R, mask=torch.rand(N, K) < 0.1).eval()(x)
    torch.testing.assert_close(bare, adapted)


def test_disabled_adapters_give_the_bare_base() -> None:
    layer = make_layer()
    x = torch.randn(3, K)
    layer.adapter_enabled = False
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight.dequantize(torch.float32), layer.bias))
    torch.testing.assert_close(layer.effective_weight(), layer.weight.dequantize(torch.float32))


def test_dropout_follows_the_random_state() -> None:
    layer = make_layer(density=0.0, dropout=0.5).train()
    x = torch.randn(3, K)
    torch.manual_seed(1)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, nn.Module.bfloat16])
def test_casting_the_model_leaves_base_and_adapter_alone(cast: object) -> None:
    layer = make_layer()
    before = {name: value.detach().clone() for name, value in layer.adapter_parameters().items()}
    packed = {name: value.clone() for name, value in layer.weight.tensors().items()}
    cast(nn.Sequential(layer))  # type: ignore[operator]
    for name, value in layer.adapter_parameters().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    for name, value in layer.weight.tensors().items():
        assert value.dtype == packed[name].dtype and torch.equal(value, packed[name])


def test_saves_its_input_once() -> None:
    layer = make_layer(bias=False)
    x = torch.randn(512, K, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}
    frozen = {tensor.data_ptr() for tensor in layer.weight.tensors().values()}
    frozen |= {value.data_ptr() for value in layer.state_dict().values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in frozen:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    projected = 512 * R * 2
    assert sum(kept.values()) <= x.numel() * 2 + projected


@pytest.mark.parametrize("rank", [-1, min(N, K) + 1])
def test_ranks_that_do_not_fit_are_refused(rank: int) -> None:
    with pytest.raises(InputError, match="rank"):
        QRosaLinear.from_linear(nn.Linear(K, N), rank=rank)


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="mask"):
        QRosaLinear.from_linear(nn.Linear(K, N), mask=torch.ones(N, K + 1, dtype=torch.bool))
    with pytest.raises(InputError, match="mask"):
        QRosaLinear.from_linear(nn.Linear(K, N), mask=CsrDelta.from_positions(torch.tensor([0]), (1, 1)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_fixed_layer_computes_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 48, bias=bias, dtype=torch.bfloat16)
    layer = QRosaLinear.from_linear(dense, rank=4, mask=torch.rand(48, 128) < 0.05).eval()
    layer.low_rank.B.data.normal_()
    layer.sparse_values.data.normal_()
    few, many, wide = torch.randn(1, 2, 128).bfloat16(), torch.randn(40, 128).bfloat16(), torch.randn(2, 128)
    with torch.inference_mode():
        free = [layer(x) for x in (few, many, wide)]
        with layer.fixed():
            assert layer._plan is not None
            fixed = [layer(x) for x in (few, many, wide)]
            other = QRosaLinear.from_linear(nn.Linear(128, 48).bfloat16()).weight
            weight, layer.weight = layer.weight, other  # as a streamed base does
            assert not torch.equal(layer(few), fixed[0])
            layer.weight = weight
    assert layer._plan is None
    assert all(torch.equal(one, same) for one, same in zip(free, fixed, strict=True))
    layer.adapter_enabled = False
    with torch.inference_mode():
        free_bare = layer(few)
        with layer.fixed():
            bare = layer(few)
    assert torch.equal(bare, free_bare) and not torch.equal(bare, free[0])
