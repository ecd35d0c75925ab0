"""Starting values: S at the quantisation error, the low-rank part at the weighted fit of what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qrosa.adapters import low_rank
from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.base_files import read_original_weight
from qrosa.base.open import open_base
from qrosa.config import MaskConfig
from qrosa.errors import InputError
from qrosa.masks import repair
from qrosa.masks.repair import init_low_rank, input_rms, set_masks, weighted_factors
from qrosa.masks.residual import residual
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample
from qrosa.masks.topk import top_positions


@pytest.fixture
def originals(tiny_model_dir: Callable[..., Path], base: Any) -> dict[str, Tensor]:
    """The 16-bit matrices that the base was made from, in fp32."""
    base_files = open_base(str(tiny_model_dir("llama")))
    return {path: read_original_weight(base_files, path).float() for path in quantized_linears(base)}


def random_masks(model: Any) -> dict[str, Tensor]:
    nnz = dict.fromkeys(quantized_linears(model), 100)
    return choose_positions(model, (), config=MaskConfig(mask_score="random"), nnz=nnz, seed=5)


def already_quantised(model: Any) -> None:
    import dataclasses

    model.qrosa_base = dataclasses.replace(model.qrosa_base, kind="nf4")


def test_residual_score_ranks_by_the_size_of_the_error(base: Any, originals: dict[str, Tensor]) -> None:
    nnz = dict.fromkeys(originals, 77)
    found = choose_positions(base, (), config=MaskConfig(mask_score="residual"), nnz=nnz, seed=0)
    for path, layer in quantized_linears(base).items():
        error = (originals[path] - layer.weight.dequantize(torch.float32)).abs()
        assert torch.equal(found[path], top_positions(error, 77))


def test_sparse_values_start_exactly_at_the_error(base: Any, originals: dict[str, Tensor]) -> None:
    masks = random_masks(base)
    assert set_masks(base, masks) == []
    for path, layer in quantized_linears(base).items():
        delta = layer.sparse_delta()
        error = originals[path] - layer.weight.dequantize(torch.float32)
        assert torch.equal(delta.positions(), masks[path])
        assert torch.equal(delta.values, error.view(-1)[masks[path]])
        repaired = layer.effective_weight(torch.bfloat16).view(-1)[masks[path]]
        assert torch.equal(repaired, originals[path].view(-1)[masks[path]].bfloat16())


def test_a_trained_low_rank_part_is_kept_beside_the_error(base: Any, originals: dict[str, Tensor]) -> None:
    masks = random_masks(base)
    _train_low_rank(base)
    set_masks(base, masks)
    for path, layer in quantized_linears(base).items():
        error = originals[path] - layer.weight.dequantize(torch.float32)
        assert torch.equal(layer.sparse_values, error.view(-1)[masks[path]])


def test_after_a_low_rank_start_at_the_error_sparse_values_take_what_is_left(
    base: Any, originals: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_CHUNK", 33)
    masks = random_masks(base)
    _train_low_rank(base)
    set_masks(base, masks, low_rank_repairs=True)
    for path, layer in quantized_linears(base).items():
        at = masks[path]
        torch.testing.assert_close(
            layer.effective_weight().view(-1)[at], originals[path].view(-1)[at], rtol=1e-6, atol=1e-6
        )


def _train_low_rank(model: Any) -> None:
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 3))
    for layer in quantized_linears(model).values():
        layer.low_rank.B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))


def test_zero_start_and_layers_without_positions(base: Any) -> None:
    masks = random_masks(base)
    first = next(iter(masks))
    masks[first] = masks[first][:0]
    assert set_masks(base, masks, init="zero") == []
    for path, layer in quantized_linears(base).items():
        assert layer.nnz == (0 if path == first else 100)
        assert path == first or not layer.sparse_values.any()
    assert quantized_linears(base)[first].sparse_delta() is None


def test_an_already_quantised_base_starts_at_zero_with_a_notice(base: Any, rows: list[Sample]) -> None:
    already_quantised(base)
    (notice,) = set_masks(base, random_masks(base))
    assert "already quantised" in notice and "sparse part starts at zero" in notice
    assert not any(layer.sparse_values.any() for layer in quantized_linears(base).values())
    inject_low_rank(base, dict.fromkeys(quantized_linears(base), 2))
    (notice,) = init_low_rank(base, rows)
    assert "low-rank part starts at no change" in notice
    with pytest.raises(InputError, match="quantisation error is unknown") as caught:
        choose_positions(base, (), config=MaskConfig(mask_score="residual"), nnz={}, seed=0)
    assert "--mask-score squared" in caught.value.hint


def test_a_checkpoint_of_another_size_is_refused(base: Any) -> None:
    class Other:
        source, kind = "elsewhere", "dense"

        def read(self, name: str) -> Tensor:
            return torch.zeros(3, 5)

    path, layer = next(iter(quantized_linears(base).items()))
    with pytest.raises(InputError, match=r"is \(64, 64\) in the base but \(3, 5\) in elsewhere"):
        residual(Other(), path, layer.weight)  # type: ignore[arg-type]


def test_input_rms_equals_the_definition(base: Any, rows: list[Sample]) -> None:
    layers = quantized_linears(base)
    seen: dict[str, list[Tensor]] = {path: [] for path in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: seen[path].append(inputs[0].flatten(0, -2)))
        for path, layer in layers.items()
    ]
    found = input_rms(base, layers, rows)
    for handle in handles:
        handle.remove()
    for path in layers:
        torch.testing.assert_close(found[path], torch.cat(seen[path]).square().mean(0).sqrt())
        assert not layers[path]._forward_pre_hooks


def weighted_error(error: Tensor, product: Tensor, rms: Tensor) -> float:
    return float(((error - product) * rms).norm() / (error * rms).norm())


def test_the_fit_is_the_best_of_its_rank_in_the_weighted_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    error, rms = torch.randn(40, 60, generator=generator), torch.rand(60, generator=generator) * 3 + 0.05
    b, a = weighted_factors(error, rms, 5, seed=0)
    sigma = torch.linalg.svdvals(error * rms)
    optimum = float(sigma[5:].norm() / sigma.norm())
    assert weighted_error(error, b @ a, rms) == pytest.approx(optimum, rel=1e-4)
    b, a = weighted_factors(error, torch.ones(60), 5, seed=0)
    assert weighted_error(error, b @ a, rms) > 1.02 * optimum  # a plain SVD fits the wrong norm


def test_the_randomised_fit_is_close_to_the_best_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    error, rms = torch.randn(300, 400, generator=generator), torch.rand(400, generator=generator) + 0.05
    before = torch.get_rng_state()
    b, a = weighted_factors(error, rms, 8, seed=3)
    again = weighted_factors(error, rms, 8, seed=3)
    assert torch.equal(b, again[0]) and torch.equal(a, again[1])
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(repair, "_FULL_SVD", 1000)
    exact_b, exact_a = weighted_factors(error, rms, 8, seed=3)
    gained = 1 - weighted_error(error, b @ a, rms)
    assert gained > 0.97 * (1 - weighted_error(error, exact_b @ exact_a, rms))


def test_a_silent_channel_does_not_explode() -> None:
    error = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    rms = torch.ones(30)
    rms[7] = 0.0
    _, a = weighted_factors(error, rms, 4, seed=0)
    assert bool(a.isfinite().all()) and float(a.abs().max()) < 1e4
    _, a = weighted_factors(error, torch.zeros(30), 4, seed=0)
    assert bool(a.isfinite().all())


@pytest.mark.parametrize("with_sparse", [False, True])
def test_low_rank_start_reduces_the_output_error(
    with_sparse: bool, base: Any, rows: list[Sample], originals: dict[str, Tensor]
) -> None:
    inject_low_rank(base, {path: 4 for path in originals if "mlp" in path}, alpha=16)
    if with_sparse:
        set_masks(base, random_masks(base))
    layers = quantized_linears(base)
    rms = input_rms(base, layers, rows)
    before = {path: layer.effective_weight() for path, layer in layers.items()}
    assert init_low_rank(base, rows) == []
    for path, layer in layers.items():
        if not layer.rank:
            assert torch.equal(layer.effective_weight(), before[path])
            continue
        left = originals[path] - before[path]  # R - S
        optimum = torch.linalg.svdvals(left * rms[path])[4:].norm() / (left * rms[path]).norm()
        found = weighted_error(left, layer.effective_weight() - before[path], rms[path])
        assert found == pytest.approx(float(optimum), rel=5e-3)  # the factors are rounded to bf16
        assert layer.low_rank.A.dtype == layer.low_rank.B.dtype == torch.bfloat16
