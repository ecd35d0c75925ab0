"""Learning rates by rule: the two points that they go through, and what they follow."""

from __future__ import annotations

import math

import pytest

from qrosa.optim.rates import MOST, choose_rates


def test_the_paper_and_the_small_model() -> None:
    paper = choose_rates(width=4096, alpha=16, steps=256)
    assert (paper.low_rank, paper.sparse) == (7e-4, 2e-4)
    small = choose_rates(width=576, alpha=16, steps=100)
    assert 2e-3 <= small.low_rank <= 6e-3
    assert small.sparse == pytest.approx(1e-3, rel=0.2)


def test_rates_fall_with_width_and_steps_within_bounds() -> None:
    def rate(**settings: float) -> float:
        return choose_rates(**{"width": 1024, "steps": 256, **settings}).low_rank  # type: ignore[arg-type]

    assert rate(width=4096) == pytest.approx(rate() / 2, rel=0.02)
    assert rate(steps=1024) == pytest.approx(rate() / 2, rel=0.02)
    assert rate(steps=64) == pytest.approx(rate() * 2, rel=0.02)
    assert rate(steps=1) == rate(steps=64) == pytest.approx(rate() * MOST, rel=0.02)
    assert rate(steps=100_000) == rate(steps=1024)
    assert choose_rates(width=1024).low_rank == rate()


def test_alpha_scales_the_low_rank_rate_alone() -> None:
    one, other = choose_rates(width=1024, alpha=16), choose_rates(width=1024, alpha=32)
    assert other.low_rank == pytest.approx(one.low_rank / 2, rel=0.04)
    assert other.sparse == one.sparse


def test_given_rates_are_kept_and_the_other_follows() -> None:
    both = choose_rates(width=576, steps=10, low_rank=1e-5, sparse=0.3)
    assert (both.low_rank, both.sparse, both.reason) == (1e-5, 0.3, "")
    first = choose_rates(width=576, steps=10, low_rank=1e-4)
    assert first.low_rank == 1e-4 and first.sparse == pytest.approx(2e-4 / 7, rel=0.02)
    second = choose_rates(width=576, alpha=32, sparse=2e-4)
    assert second.sparse == 2e-4 and second.low_rank == pytest.approx(3.5e-4, rel=0.02)
    assert "sparse" in first.reason and "0.0001" in first.reason


def test_the_reason_names_what_it_follows_from() -> None:
    found = choose_rates(width=576, alpha=8, steps=75)
    for text in ("576", "alpha 8", "75 steps", f"{found.low_rank:g}", f"{found.sparse:g}"):
        assert text in found.reason
    assert math.isfinite(found.low_rank)
