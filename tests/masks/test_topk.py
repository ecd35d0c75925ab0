"""Exact top-k: against a full sort, with ties, over chunks, and over a whole model at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrosa.masks import topk
from qrosa.masks.topk import MatrixPicker, ModelPicker, top_positions


def by_sorting(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The definition: sort stably by falling score, so that equal scores stay in order of position."""
    return scores.flatten().sort(descending=True, stable=True).indices[:k].sort().values


@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    share=st.floats(0, 1),
    chunk=st.sampled_from([1, 3, 7, 1000]),
    pilot=st.sampled_from([1, 20, 1000]),
)
@settings(max_examples=200, deadline=None)
def test_equals_a_stable_sort_whatever_the_ties_and_chunks(
    values: list[int], share: float, chunk: int, pilot: int
) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    k = round(share * len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "TOP_K_CHUNK", chunk)
        patch.setattr(topk, "PILOT", pilot)
        assert torch.equal(top_positions(scores, k), by_sorting(scores, k))


def test_large_continuous_scores() -> None:
    scores = torch.randn(1234, 567, generator=torch.Generator().manual_seed(0)).square()
    assert torch.equal(top_positions(scores, 4321), by_sorting(scores, 4321))


def test_zero_scores_are_taken_last_and_lowest_position_first() -> None:
    scores = torch.zeros(4, 5)
    scores[3, 2] = 1e-30
    assert top_positions(scores, 3).tolist() == [0, 1, 17]


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 6"):
        top_positions(torch.zeros(2, 3), k)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    levels=st.integers(1, 30),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_model_wide_picks_equal_one_sort_over_everything(
    sizes: list[int], levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = {f"m{i}": torch.randint(levels, (size,), generator=generator).float() for i, size in enumerate(sizes)}
    total = round(share * sum(sizes))
    picker = ModelPicker(list(matrices), total)
    for path, scores in matrices.items():
        picker.add(path, scores)
    found, start = picker.result(), 0
    expected = by_sorting(torch.cat(list(matrices.values())), total)
    together = []
    for path, scores in matrices.items():
        together.append(found[path] + start)
        start += scores.numel()
    assert torch.equal(torch.cat(together), expected)


def test_model_picker_holds_a_bounded_number_of_candidates() -> None:
    picker = ModelPicker([f"m{i}" for i in range(50)], 10)
    for index in range(50):
        picker.add(
            f"m{index}",
            torch.rand(1000, generator=torch.Generator().manual_seed(index)),
        )
        assert sum(scores.numel() for scores in picker._scores) <= 20


def test_matrix_picker_names_every_path() -> None:
    picker = MatrixPicker({"a": 2, "b": 0})
    picker.add("a", torch.tensor([[0.0, 3.0], [1.0, 2.0]]))
    assert {path: positions.tolist() for path, positions in picker.result().items()} == {"a": [1, 3], "b": []}
