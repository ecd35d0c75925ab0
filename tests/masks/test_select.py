"""Mask selection against dense gradients, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.load import load_base
from qrosa.config import MaskConfig
from qrosa.errors import DoesNotFitError, InputError, TrainingError
from qrosa.masks.exact import accumulate
from qrosa.masks.residual import checkpoint_of, residual
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample, sample_loss
from qrosa.masks.topk import top_positions

FAMILIES = ("llama", "qwen3", "gemma2", "phi3")


def counts(model: Any, share: float = 0.02) -> dict[str, int]:
    return {path: round(share * layer.in_features * layer.out_features) for path, layer in linears(model).items()}


def linears(model: Any) -> dict[str, Any]:
    return quantized_linears(model)


def choose(model: Any, rows: Any, **changes: Any) -> dict[str, Tensor]:
    settings = {name: changes.pop(name) for name in list(changes) if name.startswith("mask_")}
    settings.setdefault("mask_selection", "exact")
    return choose_positions(
        model, rows, config=MaskConfig(**settings), nnz=changes.pop("nnz", counts(model)), seed=11, **changes
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def statistics(model: Any, rows: list[Sample], square: bool) -> dict[str, Tensor]:
    stats = {path: torch.zeros(layer.weight.shape) for path, layer in linears(model).items()}
    accumulate(model, linears(model), stats, rows, square)
    return stats


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_dense_gradients(
    family: str, square: bool, tiny_model_dir: Callable[..., Path], rows: list[Sample], dense_gradients: Any
) -> None:
    model = load_base(str(tiny_model_dir(family)), dtype=torch.float32)[0]
    found = statistics(model, rows, square)
    for path, gradients in _by_path(dense_gradients(model, rows)).items():
        expected = sum(g.square() if square else g for g in gradients)
        # Both are fp32 sums of the same products in another order.
        torch.testing.assert_close(found[path], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def _by_path(per_row: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {path: [gradients[path] for gradients in per_row] for path in per_row[0]}


@pytest.mark.parametrize("score", ["squared", "mean", "repair", "curvature"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_picks_are_the_top_of_the_statistic(score: str, scope: str, base: Any, rows: list[Sample]) -> None:
    stats = {path: stat.abs() for path, stat in statistics(base, rows, score in ("squared", "curvature")).items()}
    base_files = checkpoint_of(base)
    for path, layer in linears(base).items():
        error = residual(base_files, path, layer.weight).abs()
        stats[path] *= {"repair": error, "curvature": error.square()}.get(score, 1)
    nnz = counts(base)
    found = choose(base, rows, mask_score=score, mask_scope=scope, group_bytes=100_000)
    if scope == "matrix":
        assert same(found, {path: top_positions(stats[path], nnz[path]) for path in nnz})
        return
    everything = top_positions(torch.cat([stat.flatten() for stat in stats.values()]), sum(nnz.values()))
    start, together = 0, []
    for path, stat in stats.items():
        together.append(found[path] + start)
        start += stat.numel()
    assert torch.equal(torch.cat(together), everything)


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_bit_equal_for_any_grouping(
    scope: str, dtype: torch.dtype, tiny_model_dir: Callable[..., Path], rows: list[Sample]
) -> None:
    model = load_base(str(tiny_model_dir("llama")), dtype=dtype)[0]
    sizes = [4 * layer.in_features * layer.out_features for layer in linears(model).values()]
    passes = []
    found = []
    for limit in (sum(sizes), -(-sum(sizes) // 2) + max(sizes), max(sizes)):
        ends: list[tuple[int, int]] = []
        found.append(
            choose(model, rows, mask_scope=scope, group_bytes=limit, progress=lambda *at, ends=ends: ends.append(at))
        )
        assert ends[-1][0] == ends[-1][1] == len(ends)
        passes.append(len(ends) // len(rows))
    assert passes[0] == 1 and passes[1] == 2 and passes[2] > 5
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_masks_do_not_depend_on_how_rows_are_batched(base: Any, rows: list[Sample]) -> None:
    expected = choose(base, rows)
    for size in (1, 2, 5):
        for side in ("left", "right"):
            batches = [_padded(rows[start : start + size], side) for start in range(0, len(rows), size)]
            assert same(choose(base, batches), expected)


def _padded(rows: list[Sample], side: str) -> dict[str, Tensor]:
    width = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(row.input_ids, 3) for row in rows]),
        "labels": torch.tensor([pad(row.labels, -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
    }


def test_checkpointing_changes_nothing(base: Any, rows: list[Sample]) -> None:
    plain = choose(base, rows)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train()
    calls = []
    recomputed = linears(base)["model.layers.1.mlp.down_proj"].register_forward_pre_hook(lambda *_: calls.append(1))
    assert same(choose(base, rows), plain)
    recomputed.remove()
    assert len(calls) == 2 * len(rows)  # once forward, once again in backward: checkpointing was on


def test_dropout_is_off_and_nothing_is_left_behind(base: Any, rows: list[Sample]) -> None:
    inject_low_rank(base, dict.fromkeys(linears(base), 2), dropout=0.5)
    for layer in linears(base).values():
        layer.low_rank.B.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    base.train()
    base.enable_input_require_grads()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in base.named_parameters()}
    random_state = torch.get_rng_state()
    first, second = choose(base, rows), choose(base, rows, group_bytes=50_000)
    assert same(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in base.modules())
    assert all(not layer._forward_hooks for layer in linears(base).values())
    for name, parameter in base.named_parameters():
        assert parameter.requires_grad == before[name][0] and parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    loss = base(input_ids=torch.tensor([rows[0].input_ids]), labels=torch.tensor([rows[0].labels])).loss
    loss.backward()
    assert linears(base)["model.layers.0.self_attn.q_proj"].low_rank.A.grad.abs().sum() > 0


def test_backward_stops_below_the_group(base: Any, rows: list[Sample]) -> None:
    upper = {path: layer for path, layer in linears(base).items() if ".layers.1." in path}
    stats = {path: torch.zeros(layer.weight.shape) for path, layer in upper.items()}
    below = []
    handle = linears(base)["model.layers.0.mlp.down_proj"].register_forward_hook(
        lambda module, inputs, y: below.append(y.requires_grad)
    )
    accumulate(base, upper, stats, rows, True)
    handle.remove()
    assert below == [False] * len(rows)
    assert all(stat.any() for stat in stats.values())


def test_random_has_the_exact_counts_and_needs_no_rows(base: Any) -> None:
    nnz = counts(base)
    found = choose(base, (), mask_score="random")
    assert {path: positions.numel() for path, positions in found.items()} == nnz
    together = choose(base, (), mask_score="random", mask_scope="global")
    assert sum(positions.numel() for positions in together.values()) == sum(nnz.values())


@pytest.mark.parametrize("score", ["squared", "random", "residual", "repair"])
def test_counts_of_zero_and_missing_paths(score: str, base: Any, rows: list[Sample]) -> None:
    first, second, *_ = linears(base)
    found = choose(base, rows, mask_score=score, nnz={second: 5, first: 0})
    assert list(found) == [first, second]
    assert [positions.numel() for positions in found.values()] == [0, 5]
    assert all(positions.dtype == torch.int64 for positions in found.values())


def test_only_the_first_mask_samples_rows_are_read(base: Any, rows: list[Sample]) -> None:
    def endless() -> Any:
        while True:
            yield from rows

    assert same(choose(base, endless(), mask_samples=2), choose(base, rows[:2]))


def test_zero_gradients_everywhere_fail(base: Any, rows: list[Sample]) -> None:
    base.get_output_embeddings().weight.data.zero_()
    with pytest.raises(TrainingError, match="every gradient is zero"):
        choose(base, rows)


def test_a_loss_that_is_not_finite_names_its_row(base: Any, rows: list[Sample]) -> None:
    def spoiled(model: Any, row: Sample) -> Tensor:
        return sample_loss(model, row) * (float("nan") if row == rows[2] else 1.0)

    base.train()
    with pytest.raises(TrainingError, match="selection row 3 is nan"):
        choose(base, rows, loss=spoiled)
    assert base.training and not any(layer._forward_hooks for layer in linears(base).values())


def test_bad_requests(base: Any, rows: list[Sample]) -> None:
    path = next(iter(linears(base)))
    with pytest.raises(InputError, match="no quantised layer 'nowhere'"):
        choose(base, rows, nnz={"nowhere": 1})
    with pytest.raises(InputError, match="do not fit the 4096 weights"):
        choose(base, rows, nnz={path: 4097})
    with pytest.raises(InputError, match="no row to select masks on has a supervised token"):
        choose(base, [Sample([1, 2, 3], [1, -100, -100])])
    with pytest.raises(InputError, match=r"\(3,\) tokens but \(2,\) labels"):
        choose(base, [{"input_ids": [1, 2, 3], "labels": [1, 2]}])
    with pytest.raises(DoesNotFitError, match="mask statistic"):
        choose(base, rows, group_bytes=1000)
    with pytest.raises(DoesNotFitError, match="mask statistic"):
        choose(base, rows, mask_memory="1KB")
