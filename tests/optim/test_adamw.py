"""The flat optimizer against torch's AdamW on the separate parameters, and its state on disk."""

import pytest
import torch
from safetensors.torch import load, save

from qrosa.errors import InputError, StorageError
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.kinds import OPTIMIZERS

KINDS = tuple(OPTIMIZERS)
pytestmark = pytest.mark.filterwarnings("error:Paged optimizers are not supported on CPU")


def parameters(dtype, shapes=((5, 7), (9, 5), (80, 70)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def test_fp32_parameters_follow_torch_adamw_exactly():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdapterOptimizer(ours, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.accumulate()
        optimizer.step(lr=1e-2, sparse_lr=0.0)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # The same formula; vector and scalar lanes of the fused kernel may differ in the last bit.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_small_updates_of_bf16_parameters_are_not_lost():
    params = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
    optimizer = AdapterOptimizer(params)
    for _ in range(40):
        params[0].grad = torch.ones_like(params[0])
        optimizer.accumulate()
        optimizer.step(lr=1e-4, sparse_lr=0.0)
    # One update is 1e-4, a fortieth of bf16's spacing at 1: without a master nothing would ever move.
    assert params[0][0].item() == pytest.approx(1 - 40e-4, abs=2e-3)
    assert params[0][0].item() != 1.0


def test_gradients_accumulate_in_fp32():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = AdapterOptimizer(params)
    for value in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bf16
        params[0].grad = torch.full((3,), value, dtype=torch.bfloat16)
        optimizer.accumulate()
        assert params[0].grad is None
    assert optimizer.gradients()[0].tolist() == [258.0] * 3


def test_clip_is_over_both_parts_and_tells_the_norm():
    low, sparse = parameters(torch.bfloat16), parameters(torch.float32, ((11,),))
    optimizer = AdapterOptimizer(low, sparse)
    low[0].grad = torch.full_like(low[0], 1.0)  # 35 ones
    sparse[0].grad = torch.full_like(sparse[0], 1.0)  # 11 ones
    optimizer.accumulate()
    assert optimizer.clip(2.0) == pytest.approx(46**0.5)
    assert sum(g.square().sum().item() for g in optimizer.gradients()) == pytest.approx(4.0, rel=1e-5)
    assert optimizer.clip(5.0) == pytest.approx(2.0, rel=1e-5)


def test_a_nan_gradient_shows_in_the_norm():
    params = parameters(torch.float32)
    optimizer = AdapterOptimizer(params)
    give_gradients(params, 0)
    params[1].grad[0, 0] = float("nan")
    optimizer.accumulate()
    assert optimizer.clip(1.0) != optimizer.clip(1.0)


def test_sparse_parameters_become_views_of_one_flat_tensor_and_have_their_own_rate():
    low, sparse = parameters(torch.bfloat16), parameters(torch.float32, ((11,), (0,), (5,)))
    before = [p.detach().clone() for p in (*low, *sparse)]
    optimizer = AdapterOptimizer(low)
    optimizer.add_sparse(sparse)
    master = optimizer.groups["sparse"].master
    assert master.numel() == 16
    assert sparse[2].data_ptr() == master.data_ptr() + 11 * 4
    give_gradients((*low, *sparse), 1)
    optimizer.accumulate()
    optimizer.step(lr=0.0, sparse_lr=1e-2)
    assert all(torch.equal(p, b) for p, b in zip(low, before, strict=False))
    assert not torch.equal(sparse[0], before[3])
    with pytest.raises(InputError, match="already"):
        optimizer.add_sparse(sparse)


def test_half_precision_sparse_values_are_refused():
    with pytest.raises(InputError, match="fp32"):
        AdapterOptimizer([], parameters(torch.bfloat16, ((4,),)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind):
    def fresh():
        low, sparse = parameters(torch.bfloat16), parameters(torch.float32, ((6000,),), seed=1)
        return low, sparse, AdapterOptimizer(low, sparse, kind=kind, weight_decay=0.01)

    def advance(low, sparse, optimizer, steps):
        for step in steps:
            give_gradients((*low, *sparse), step)
            optimizer.accumulate()
            optimizer.clip(1.0)
            optimizer.step(lr=1e-2, sparse_lr=1e-3)

    low, sparse, optimizer = fresh()
    advance(low, sparse, optimizer, range(4))
    stored = load(save(optimizer.state_tensors()))
    if kind != "adamw":
        assert stored["sparse.state1"].dtype == torch.uint8
        assert {"sparse.absmax1", "sparse.absmax2", "sparse.qmap1", "sparse.qmap2"} <= set(stored)
    advance(low, sparse, optimizer, range(4, 8))

    again_low, again_sparse, again = fresh()
    again.load_state_tensors(stored)
    advance(again_low, again_sparse, again, range(4, 8))
    for a, b in zip((*low, *sparse), (*again_low, *again_sparse), strict=True):
        assert torch.equal(a, b)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, again.state_tensors()[name]), name


@pytest.mark.parametrize("kind", KINDS[1:])
def test_eight_bit_states_stay_near_adamw(kind):
    moved = []
    for each in ("adamw", kind):
        params = parameters(torch.float32, ((6000,),))
        start = params[0].detach().clone()
        optimizer = AdapterOptimizer(params, kind=each)
        for step in range(20):
            give_gradients(params, step)
            optimizer.accumulate()
            optimizer.step(lr=1e-2, sparse_lr=0.0)
        moved.append(params[0].detach() - start)
    # 8-bit states carry some 2% of noise an update; over 20 steps the path stays within a tenth.
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


def test_state_of_another_adapter_is_refused():
    saved = AdapterOptimizer(parameters(torch.float32)).state_tensors()
    with pytest.raises(StorageError, match="does not match"):
        AdapterOptimizer(parameters(torch.float32, ((3, 3),))).load_state_tensors(saved)
    with pytest.raises(StorageError, match="other parts"):
        AdapterOptimizer([], parameters(torch.float32)).load_state_tensors(saved)


def test_an_empty_sparse_part_makes_no_group():
    assert set(AdapterOptimizer(parameters(torch.float32), parameters(torch.float32, ((0,),))).groups) == {"low_rank"}
