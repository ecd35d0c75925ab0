"""How much selection looks at and keeps at once: torch-free, so that the plan counts with the same figures."""

from __future__ import annotations

from collections.abc import Mapping

GRAM_TILE = 256  # tokens a tile of ``sensitivity``
TOP_K_CHUNK = 1 << 20  # scores that top-k looks at together
PILOT = 1 << 16  # scores that it samples to begin with

# The streaming statistic. Overlap with the exact mask was measured for these in bench/bench_selection.py.
DENSE_SAMPLES = 8  # samples whose whole gradient is looked at; later ones are added at the candidates only
CANDIDATE_FACTOR = 16  # candidates for each position of the mask, where nothing speaks for another number
LEAST_CANDIDATES, MOST_CANDIDATES = 4, 32  # what a plan may choose
POOL_SLACK = 1.25  # candidates of the whole model before they are cut back, of those that stay
LARGEST_SHARE = 4  # most candidates that one matrix may take of the model's, of what its size would give it


def candidates_of(counts: Mapping[str, int], sizes: Mapping[str, int], factor: int) -> dict[str, int]:
    """Path -> candidates of each matrix: ``factor`` times its positions, or all of its weights."""
    return {path: min(size, factor * counts[path]) for path, size in sizes.items()}


def candidates_of_model(counts: Mapping[str, int], sizes: Mapping[str, int], factor: int) -> int:
    """Candidates where the best positions of the whole model are wanted."""
    return min(sum(sizes.values()), factor * sum(counts.values()))


def largest_candidates(counts: Mapping[str, int], sizes: Mapping[str, int], factor: int, scope: str) -> dict[str, int]:
    """Path -> most candidates that a matrix may have at once."""
    if scope == "matrix":
        return candidates_of(counts, sizes, factor)
    return largest_shares(candidates_of_model(counts, sizes, factor), sizes)


def largest_shares(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Path -> most candidates of one matrix, where ``total`` of the whole model are kept."""
    everything = sum(sizes.values())
    return {path: min(size, -(-LARGEST_SHARE * total * size // everything)) for path, size in sizes.items()}
