"""Cutting the model's matrices into groups whose statistics fit a memory bound.

The statistic of one matrix is dense, fp32 [N, K]: four bytes a weight, eight times the packed base. All of them at
once would not fit, so selection collects them for one group of layers at a time and reads the same samples once a
group. A group is a run of matrices in model order, filled until the bound is reached; a run cuts across decoder
layers where that saves a pass. Torch-free, so that the plan can count the passes.
"""

from __future__ import annotations

from collections.abc import Mapping

from qrosa.errors import DoesNotFitError
from qrosa.quantities import bytes_text

STATISTIC_BYTES = 4


def group_matrices(sizes: Mapping[str, int], limit: int | None = None) -> list[list[str]]:
    """Groups of paths, in order, each with at most ``limit`` bytes of statistics.

    Args:
        sizes: Path -> number of weights N * K, in model order.
        limit: Bytes; None puts everything into one group.

    Raises:
        DoesNotFitError: One matrix alone is larger than the bound.
    """
    groups: list[list[str]] = []
    used = 0
    for path, size in sizes.items():
        need = size * STATISTIC_BYTES
        if limit is not None and need > limit:
            raise DoesNotFitError(
                f"the mask statistic of {path} takes {bytes_text(need)}, {bytes_text(limit)} is allowed",
                f"raise --mask-memory to at least {-(-max(sizes.values()) * STATISTIC_BYTES // 2**20)}MB",
            )
        if not groups or (limit is not None and used + need > limit):
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += need
    return groups
