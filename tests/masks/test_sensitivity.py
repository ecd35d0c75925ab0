"""Sensitivities against dense gradients, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qrosa.adapters.inject import linear_shapes, quantized_linears
from qrosa.base.load import load_base
from qrosa.errors import InputError, TrainingError
from qrosa.masks.exact import accumulate
from qrosa.masks.passes import group_matrices
from qrosa.masks.selection_rows import Sample
from qrosa.masks.sensitivity import measure_sensitivity, squared_norm


@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
@pytest.mark.parametrize("tile", [1, 8, 256])
def test_the_norm_is_that_of_the_product(tokens: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dy = torch.randn(tokens, 24, generator=generator) + 1  # tokens agree, so that pairs of them matter
    x = torch.randn(tokens, 40, generator=generator) + 1
    expected = (dy.double().T @ x.double()).square().sum()
    torch.testing.assert_close(squared_norm(dy, x, tile), expected, rtol=1e-5, atol=0)
    rounded = squared_norm(dy.bfloat16(), x.bfloat16(), tile)
    exact = (dy.bfloat16().double().T @ x.bfloat16().double()).square().sum()
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_sensitivities_equal_dense_gradients(
    family: str, tiny_model_dir: Callable[..., Path], rows: list[Sample], dense_gradients: Any
) -> None:
    model = load_base(str(tiny_model_dir(family)), dtype=torch.float32)[0]
    found = measure_sensitivity(model, rows)
    assert list(found) == [linear.path for linear in linear_shapes(model)]
    gradients = dense_gradients(model, rows)
    for path, value in found.items():
        expected = sum(float(each[path].double().square().sum()) for each in gradients) / len(rows)
        assert value == pytest.approx(expected, rel=2e-3)


def test_they_are_the_sums_of_the_masks_statistics_in_any_grouping(base: Any, rows: list[Sample]) -> None:
    found = measure_sensitivity(base, rows)
    layers = quantized_linears(base)
    sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    for limit in (None, 4 * max(sizes.values())):
        for group in group_matrices(sizes, limit):
            statistics = {path: torch.zeros(layers[path].weight.shape) for path in group}
            accumulate(base, {path: layers[path] for path in group}, statistics, rows, True)
            for path, statistic in statistics.items():
                assert found[path] == pytest.approx(float(statistic.double().sum()) / len(rows), rel=1e-4)


def test_the_model_is_left_as_it_was(base: Any, rows: list[Sample]) -> None:
    base.train()
    before = [base(input_ids=torch.tensor([rows[0].input_ids])).logits for _ in range(2)]
    first = measure_sensitivity(base, rows)
    assert base.training and all(module.training for module in base.modules())
    assert all(not module._forward_hooks for module in quantized_linears(base).values())
    assert torch.equal(base(input_ids=torch.tensor([rows[0].input_ids])).logits, before[0])
    assert measure_sensitivity(base, rows) == first


def test_limit_and_progress(base: Any, rows: list[Sample]) -> None:
    told: list[tuple[int, int]] = []
    some = measure_sensitivity(base, rows, limit=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert some == measure_sensitivity(base, rows[:2]) != measure_sensitivity(base, rows)


def test_what_cannot_be_measured(base: Any, rows: list[Sample]) -> None:
    with pytest.raises(InputError, match="supervised token"):
        measure_sensitivity(base, [Sample([1, 2, 3], [-100, -100, -100])])
    with pytest.raises(TrainingError, match="every gradient is zero"):
        measure_sensitivity(base, rows, loss=lambda model, sample: 0 * _loss(model, sample))
    with pytest.raises(TrainingError, match=r"the sensitivity of .* is not finite"):
        measure_sensitivity(base, rows, loss=lambda model, sample: _blow_up(_loss(model, sample)))


def _loss(model: Any, sample: Sample) -> torch.Tensor:
    return model(input_ids=torch.tensor([sample.input_ids])).logits.square().mean()


def _blow_up(loss: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is not."""
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss
