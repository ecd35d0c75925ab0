"""What the table's scores say about one method against another, with the standard library alone.

Runs with one task and one seed saw the same rows in the same order and were scored on the same rows, so everything is
paired. Two tests, both of sign flips (if neither method is better, each difference might as well have had the other
sign):

- *within a task*: differences row by row, each averaged over the seeds; flips drawn at random;
- *over tasks*: one difference a task, averaged over rows and seeds; all flips counted, 4096 for twelve tasks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import sqrt
from statistics import mean, stdev

DRAWS = 5000
MOST_EXACT = 14  # differences of which all flips are counted


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences being that far from 0, by flipping their signs.

    Exact for up to ``MOST_EXACT`` differences that are not 0, else over ``DRAWS`` random flips with a fixed seed.
    """
    own = [value for value in differences if value]
    if not own:
        return 1.0
    # Summed the same way as the flipped ones are, so that the flip that changes nothing counts whatever rounding does.
    far = abs(sum(own)) - 1e-9
    if len(own) <= MOST_EXACT:
        flips = [
            abs(sum(s * v for s, v in zip(signs, own, strict=True))) for signs in product((1, -1), repeat=len(own))
        ]
        return sum(flip >= far for flip in flips) / len(flips)
    draw = random.Random(0)
    hits = sum(abs(sum(v if draw.random() < 0.5 else -v for v in own)) >= far for _ in range(DRAWS))
    return (hits + 1) / (DRAWS + 1)


def average_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Method -> its mean rank over tasks, 1 for the best; equal scores share their ranks.

    Args:
        scores: Task -> method -> score; every task has all methods.
    """
    ranks: dict[str, list[float]] = {}
    for by_method in scores.values():
        for method, score in by_method.items():
            better = sum(other > score for other in by_method.values())
            equal = sum(other == score for other in by_method.values())
            ranks.setdefault(method, []).append(better + (equal + 1) / 2)
    return {method: mean(found) for method, found in ranks.items()}


def row_differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    """By row, how much better ``a`` is than ``b``, averaged over the seeds.

    Args:
        a: Seed -> row -> score.
        b: The same, with the same seeds and rows.

    Raises:
        ValueError: They do not have the same shape.
    """
    pairs = [list(zip(x, y, strict=True)) for x, y in zip(a, b, strict=True)]
    return [mean(x - y for x, y in row) for row in zip(*pairs, strict=True)]
