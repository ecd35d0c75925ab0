"""Streamed statistics: the exact ones where nothing is forgotten, a plain definition where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.config import MaskConfig
from qrosa.errors import TrainingError
from qrosa.masks import candidates as candidates_module
from qrosa.masks.candidates import MatrixCandidates, ModelCandidates
from qrosa.masks.exact import accumulate
from qrosa.masks.scores import MASK_SCORES
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample
from qrosa.masks.stream import streamed_statistics

GRADIENT_SCORES = [name for name, score in MASK_SCORES.items() if score.reads_gradients]
SCOPES = ("matrix", "global")
ALL = 10**6  # candidates for each position: every weight of these small matrices


def counts(model: Any, share: float = 0.02) -> dict[str, int]:
    return {
        path: round(share * layer.in_features * layer.out_features) for path, layer in quantized_linears(model).items()
    }


def choose(model: Any, rows: list[Sample], selection: str, **changes: Any) -> dict[str, Tensor]:
    settings = {name: changes.pop(name) for name in list(changes) if name.startswith("mask_")}
    config = MaskConfig(mask_selection=selection, **settings)
    return choose_positions(model, rows, config=config, nnz=counts(model), seed=1, **changes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    both = sum(int(torch.isin(one[path], other[path]).sum()) for path in one)
    return both / sum(positions.numel() for positions in other.values())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_with_every_weight_a_candidate_masks_are_the_exact_ones(
    score: str, scope: str, base: Any, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrosa.masks.sizes.LARGEST_SHARE", ALL)
    wanted = {"mask_score": score, "mask_scope": scope}
    assert same(choose(base, rows, "stream", candidate_factor=ALL, **wanted), choose(base, rows, "exact", **wanted))


@pytest.mark.parametrize("scope", SCOPES)
def test_few_candidates_find_most_of_the_exact_mask(scope: str, base: Any, rows: list[Sample]) -> None:
    exact = choose(base, rows, "exact", mask_scope=scope)
    few, many = (choose(base, rows, "stream", mask_scope=scope, candidate_factor=factor) for factor in (2, 8))
    assert 0.5 < overlap(few, exact) < overlap(many, exact)
    assert overlap(many, exact) > 0.97
    assert same(few, choose(base, rows, "stream", mask_scope=scope, candidate_factor=2))


def test_checkpointing_changes_nothing(base: Any, rows: list[Sample]) -> None:
    plain = choose(base, rows, "stream")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train()
    assert same(choose(base, rows, "stream"), plain)


@pytest.mark.parametrize("square", [True, False])
def test_later_samples_add_at_the_candidates(square: bool, base: Any, rows: list[Sample]) -> None:
    layers = quantized_linears(base)
    score = MASK_SCORES["squared" if square else "mean"]
    found = MatrixCandidates(layers, score, counts(base, 0.1), no_error)
    dense = {path: torch.zeros(layer.weight.shape) for path, layer in layers.items()}
    accumulate(base, layers, dense, rows, square)
    first = {path: torch.zeros(layer.weight.shape) for path, layer in layers.items()}
    accumulate(base, layers, first, rows[:1], square)
    for path, positions, sums in streamed_statistics(base, layers, found, rows, dense_samples=1):
        assert positions is not None
        best = torch.zeros(first[path].numel(), dtype=torch.bool)
        best[first[path].abs().flatten().topk(positions.numel()).indices] = True
        assert torch.equal(best.nonzero().flatten(), positions)
        expected = dense[path].flatten()[positions]
        torch.testing.assert_close(sums, expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


def no_error(path: str) -> Tensor:
    raise AssertionError(f"the error of {path} was read")


@pytest.fixture
def layers() -> dict[str, QRosaLinear]:
    """Three small layers; their weights do not matter."""
    shapes = {"a": (64, 3), "b": (64, 5), "c": (128, 2)}
    return {path: QRosaLinear.from_linear(nn.Linear(*shape, bias=False)) for path, shape in shapes.items()}


def gradients(layers: dict[str, QRosaLinear], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """One sample: dY and X of a token for each layer, small whole numbers, so that sums are exact and ties happen."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for path, layer in layers.items():
        shapes = (1, layer.out_features), (1, layer.in_features)
        dy, x = (torch.randint(-3, 4, shape, generator=draw).float() for shape in shapes)
        made[path] = (dy, x)
    return made


@pytest.mark.parametrize("name", ["squared", "mean"])
def test_a_matrix_keeps_the_best_of_what_it_kept_and_what_is_new(name: str, layers: dict[str, QRosaLinear]) -> None:
    score, limits = MASK_SCORES[name], {"a": 10, "b": 25, "c": 256}
    found = MatrixCandidates(layers, score, limits, no_error)
    kept = {path: torch.zeros(layer.in_features * layer.out_features) for path, layer in layers.items()}
    for seed in range(4):
        for path, (dy, x) in gradients(layers, seed).items():
            found.look(path, dy, x)
            gradient = (dy.T @ x).flatten()
            kept[path] += gradient.square() if score.squares else gradient
            order = kept[path].abs().sort(descending=True, stable=True).indices
            kept[path][order[limits[path] :]] = 0.0
        found.end_sample()
    for path in layers:
        delta = found.take(path)
        delta.check()
        assert delta.nnz == limits[path]
        assert torch.equal(delta.to_dense().flatten(), kept[path])


@pytest.mark.parametrize("name", ["squared", "mean"])
def test_the_model_never_holds_much_more_than_its_limit(name: str, layers: dict[str, QRosaLinear]) -> None:
    found = ModelCandidates(layers, MASK_SCORES[name], 100, no_error)
    for seed in range(6):
        for path, (dy, x) in gradients(layers, seed).items():
            found.look(path, dy * (10.0 if path == "b" else 1.0), x)
            assert sum(delta.nnz for delta in found._kept.values()) <= 1.25 * 100
        found.end_sample()
        held = {path: delta.nnz for path, delta in found._kept.items()}
        assert sum(held.values()) == 100
    assert held["b"] > held["a"]  # where gradients are larger, more is kept


def test_a_layer_without_gradients_gets_its_lowest_positions(layers: dict[str, QRosaLinear]) -> None:
    found = MatrixCandidates(layers, MASK_SCORES["squared"], dict.fromkeys(layers, 7), no_error)
    delta = found.take("b")
    assert delta.positions().tolist() == list(range(7)) and not delta.values.any()


def test_a_layer_that_gradients_reach_late_is_looked_at_then(layers: dict[str, QRosaLinear]) -> None:
    found = MatrixCandidates(layers, MASK_SCORES["squared"], dict.fromkeys(layers, 7), no_error)
    found.end_looking()
    found.add("a", *gradients(layers, 3)["a"])
    assert found.take("a").nnz == 7


def test_a_gradient_that_is_not_finite_is_named(layers: dict[str, QRosaLinear]) -> None:
    found = MatrixCandidates(layers, MASK_SCORES["squared"], dict.fromkeys(layers, 7), no_error)
    dy, x = gradients(layers, 0)["c"]
    with pytest.raises(TrainingError, match="the mask score of c is not finite"):
        found.look("c", dy * float("nan"), x)


def test_left_open_it_is_exact_where_one_pass_is_enough(base: Any, rows: list[Sample]) -> None:
    def passes(**changes: Any) -> int:
        told: list[tuple[int, int]] = []
        choose(base, rows, **changes, progress=lambda done, total: told.append((done, total)))
        return told[-1][1] // len(rows)

    assert passes(selection=None, group_bytes=100_000) == 1
    assert passes(selection="exact", group_bytes=100_000) > 1
    enough = same(choose(base, rows, None, group_bytes=2**30), choose(base, rows, "exact"))
    little = same(choose(base, rows, None, group_bytes=100_000), choose(base, rows, "stream"))
    assert enough and little


def test_candidates_are_bounded_by_the_pool(monkeypatch: pytest.MonkeyPatch, base: Any, rows: list[Sample]) -> None:
    """Cutting back more often changes which candidates are kept in between, not how many there are in the end."""
    monkeypatch.setattr(candidates_module, "POOL_SLACK", 1.0)
    found = choose(base, rows, "stream", mask_scope="global")
    assert sum(positions.numel() for positions in found.values()) == sum(counts(base).values())
