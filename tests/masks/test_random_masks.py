"""The random control: exact counts, uniform, reproducible, independent of the other matrices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qrosa.masks.random_masks import draw_distinct, random_positions


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 50))
def test_exactly_so_many_distinct_rising_positions(size: int, share: float, seed: int) -> None:
    count = round(share * size)
    drawn = draw_distinct(size, count, torch.Generator().manual_seed(seed))
    assert drawn.numel() == count
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert not count or (0 <= int(drawn[0]) and int(drawn[-1]) < size)


def test_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(20)
    for _ in range(4000):
        hits[draw_distinct(20, 5, generator)] += 1
    # 4000 draws of 5 in 20: each position 1000 times, standard deviation sqrt(4000 * 0.25 * 0.75) = 27.
    assert float((hits - 1000).abs().max()) < 4 * 27


def test_a_matrix_does_not_depend_on_the_others() -> None:
    both = random_positions({"a": 1000, "b": 500}, {"a": 30, "b": 20}, "matrix", 7)
    alone = random_positions({"b": 500}, {"b": 20}, "matrix", 7)
    assert torch.equal(both["b"], alone["b"])
    assert not torch.equal(both["b"], random_positions({"b": 500}, {"b": 20}, "matrix", 8)["b"])


def test_global_draws_the_sum_from_the_whole_model() -> None:
    sizes = {"a": 1000, "b": 3000}
    drawn = random_positions(sizes, {"a": 400, "b": 0}, "global", 1)
    assert sum(positions.numel() for positions in drawn.values()) == 400
    # Hypergeometric: 100 expected in a, standard deviation 8.2.
    assert abs(drawn["a"].numel() - 100) < 35
    assert all(int(positions[-1]) < sizes[path] for path, positions in drawn.items())
