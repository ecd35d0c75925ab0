"""Exact top-k with one rule for ties: of equal scores, the lower position wins.

``torch.topk`` leaves open which of several equal values it returns, and on the CPU it copies its whole input into
pairs of value and index, four times the statistic's own size. So only the *value* of the k-th largest score is
searched, in chunks whose survivors are few, and the positions are then read off by comparing with it: every score
above it, and of those equal to it the first ones. The result is a pure function of the scores.

The best positions of the whole model are found the same way without ever holding all scores: whatever a matrix has
that is not among its own k best cannot be among the model's k best, so a running list of k candidates is enough.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK = 1 << 22


def top_positions(scores: Tensor, k: int) -> Tensor:
    """Flat positions of the ``k`` largest scores, int64, rising, on the scores' device.

    Args:
        scores: Any shape, no NaN.
        k: 0 to ``scores.numel()``.

    Raises:
        ValueError: ``k`` is out of range.
    """
    flat = scores.reshape(-1)
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k must be from 0 to {flat.numel()}, got {k}")
    if k in (0, flat.numel()):
        return torch.arange(k, device=flat.device)
    threshold, above = _kth_largest(flat, k)
    ties_left = k - above
    found = []
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chosen = chunk > threshold
        if ties_left:
            ties = (chunk == threshold).nonzero().flatten()[:ties_left]
            chosen[ties] = True
            ties_left -= ties.numel()
        found.append(chosen.nonzero().flatten() + start)
    return torch.cat(found)


def _kth_largest(flat: Tensor, k: int) -> tuple[Tensor, int]:
    """The k-th largest value, and how many are strictly larger; keeps some 2k values beside the input."""
    best = flat[:0]
    step = max(_CHUNK, k)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        if best.numel() == k:
            chunk = chunk[chunk > best.min()]
        best = torch.cat([best, chunk])
        if best.numel() > k:
            best = best.topk(k, sorted=False).values
    threshold = best.min()
    return threshold, int((best > threshold).sum())


class MatrixPicker:
    """The best positions of each matrix, each with its own count.

    Args:
        counts: Path -> positions to pick.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts
        self._positions: dict[str, Tensor] = {}

    def add(self, path: str, scores: Tensor) -> None:
        """Pick from one matrix's scores [N, K]; they may be freed afterwards."""
        self._positions[path] = top_positions(scores, self._counts[path]).cpu()

    def result(self) -> dict[str, Tensor]:
        """Path -> flat positions, int64, rising, on the CPU."""
        return {path: self._positions.get(path, torch.arange(0)) for path in self._counts}


class ModelPicker:
    """The best positions of the whole model, from one matrix at a time.

    Matrices must be added in model order: of equal scores the earlier matrix wins, then the lower position. It
    holds at most three times ``total`` candidates of 12 bytes.

    Args:
        paths: Every path that takes part, in model order.
        total: Positions to pick over all of them.
    """

    def __init__(self, paths: list[str], total: int) -> None:
        self._paths = paths
        self._total = total
        self._names: list[str] = []
        self._scores: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._floor = float("-inf")

    def add(self, path: str, scores: Tensor) -> None:
        """Keep what of one matrix's scores [N, K] may still be among the model's best."""
        flat = scores.reshape(-1)
        better = flat > self._floor
        many = int(better.sum()) > self._total
        positions = top_positions(flat, self._total) if many else better.nonzero().flatten()
        self._names.append(path)
        self._scores.append(flat[positions].cpu())
        self._positions.append(positions.cpu())
        if sum(kept.numel() for kept in self._scores) > 2 * self._total:
            self._compact()

    def _compact(self) -> None:
        """Drop all but the best ``total`` candidates; later matrices must be strictly better than the worst kept."""
        scores = torch.cat(self._scores)
        kept = top_positions(scores, min(self._total, scores.numel()))
        start = 0
        for index, positions in enumerate(self._positions):
            low, high = torch.searchsorted(kept, torch.tensor([start, start + positions.numel()])).tolist()
            mine = kept[low:high] - start
            start += positions.numel()
            self._positions[index] = positions[mine]
            self._scores[index] = self._scores[index][mine]
        if kept.numel() == self._total and self._total:
            self._floor = float(scores[kept].min())

    def result(self) -> dict[str, Tensor]:
        """Path -> flat positions, int64, rising, on the CPU; ``total`` of them in sum."""
        if self._scores:
            self._compact()
        found = dict(zip(self._names, self._positions, strict=True))
        return {path: found.get(path, torch.arange(0)) for path in self._paths}
