"""Paired tests and ranks, against values worked out by other means."""

from __future__ import annotations

import math
import random

import pytest

from bench.accuracy.statistics import average_ranks, row_differences, sign_flip_p, standard_error


def test_flips_of_equal_differences_are_binomial() -> None:
    assert sign_flip_p([0.1] * 12) == pytest.approx(2 / 2**12)
    # 10 of 12 with one sign: as the two-sided sign test has it.
    tail = sum(math.comb(12, k) for k in (0, 1, 2)) / 2**12
    assert sign_flip_p([1.0] * 10 + [-1.0] * 2) == pytest.approx(2 * tail)


def test_the_sign_of_all_differences_does_not_matter() -> None:
    draw = random.Random(3)
    for count in (9, 40):
        values = [draw.gauss(0.3, 1) for _ in range(count)]
        assert sign_flip_p(values) == pytest.approx(sign_flip_p([-value for value in values]), abs=0.02)


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip_p([]) == 1.0
    assert sign_flip_p([0.0] * 20) == 1.0
    assert sign_flip_p([0.5, -0.5]) == 1.0


def test_random_flips_agree_with_mcnemars_exact_test() -> None:
    # 30 rows that one method alone gets right, 15 that the other does.
    tail = sum(math.comb(45, k) for k in range(16)) / 2**45
    found = sign_flip_p([1.0] * 30 + [-1.0] * 15 + [0.0] * 200)
    assert found == pytest.approx(2 * tail, abs=0.01)


def test_p_values_of_noise_are_uniform() -> None:
    draw = random.Random(5)
    below = sum(sign_flip_p([draw.gauss(0, 1) for _ in range(8)]) < 0.25 for _ in range(400))
    assert 70 <= below <= 130  # 100 expected, deviation 8.7


def test_ranks_share_ties() -> None:
    found = average_ranks({"one": {"a": 0.9, "b": 0.8, "c": 0.8}, "two": {"a": 0.5, "b": 0.6, "c": 0.4}})
    assert found == {"a": 1.5, "b": 1.75, "c": 2.75}


def test_rows_are_paired_over_seeds() -> None:
    assert row_differences([[1, 0, 1], [1, 1, 1]], [[0, 0, 1], [0, 1, 0]]) == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError):
        row_differences([[1, 0]], [[1, 0, 1]])
    with pytest.raises(ValueError):
        row_differences([[1, 0]], [[1, 0], [0, 1]])


def test_standard_error() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert standard_error([1.0]) == 0.0
