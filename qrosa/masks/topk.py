"""Exact top-k with one rule for ties: of equal scores, the lower position wins.

``torch.topk`` leaves open which of several equal values it returns, and on the CPU it copies its whole input into
pairs of value and index, four times the statistic's own size. So only the *value* of the k-th largest score is
searched, and the positions are then read off by comparing with it: every score above it, and of those equal to it the
first ones. The result is a pure function of the scores.

A sample of the scores says between which two values the k-th largest must lie; one pass over the scores counts what is
above and takes out what is between, which is little. Where the sample was wrong, or many scores are equal, the value
is found bit by bit, by counting, which takes 31 passes and no memory.

The best positions of the whole model are found the same way without ever holding all scores: whatever a matrix has
that is not among its own k best cannot be among the model's k best, so a running list of k candidates is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrosa.masks.sizes import PILOT, TOP_K_CHUNK

_SPREAD = 6.0  # standard deviations on either side of the expected rank in the sample


def top_positions(scores: Tensor, k: int) -> Tensor:
    """Flat positions of the ``k`` largest scores, int64, rising, on the scores' device.

    Args:
        scores: fp32 of any shape, no NaN, none negative.
        k: 0 to ``scores.numel()``.

    Raises:
        ValueError: ``k`` is out of range.
    """
    flat = scores.reshape(-1)
    return cut([flat], k).positions(flat)


@dataclass
class Cut:
    """What separates the k largest scores from the rest.

    Attributes:
        threshold: The k-th largest score.
        ties: How many of those that are equal to it belong to the k; each list takes the first that are left.
    """

    threshold: Tensor
    ties: int

    def positions(self, scores: Tensor) -> Tensor:
        """Positions of those of ``scores`` [n] that are among the k largest, int64, rising; lists in their order."""
        found = [torch.arange(0, device=scores.device)]
        for start, chunk in _chunks(scores):
            chosen = chunk > self.threshold
            if self.ties:
                equal = (chunk == self.threshold).nonzero().flatten()[: self.ties]
                chosen[equal] = True
                self.ties -= equal.numel()
            found.append(chosen.nonzero().flatten() + start)
        return torch.cat(found)


def cut(lists: Sequence[Tensor], k: int) -> Cut:
    """Where the ``k`` largest of all scores end; of equals the earlier list's belong to them.

    Args:
        lists: fp32 tensors [n] on one device, no NaN, none negative.
        k: 0 to the number of all scores.

    Raises:
        ValueError: ``k`` is out of range.
    """
    total = sum(scores.numel() for scores in lists)
    if not 0 <= k <= total:
        raise ValueError(f"k must be from 0 to {total}, got {k}")
    if k in (0, total):
        return Cut(torch.full_like(lists[0][:1].sum(), -math.inf if k else math.inf), 0)
    threshold, above = _kth_largest(lists, k)
    return Cut(threshold, k - above)


def _chunks(scores: Tensor) -> list[tuple[int, Tensor]]:
    """(start, scores from there) in pieces that are looked at together."""
    return [(start, scores[start : start + TOP_K_CHUNK]) for start in range(0, scores.numel(), TOP_K_CHUNK)]


def _kth_largest(lists: Sequence[Tensor], k: int) -> tuple[Tensor, int]:
    """The k-th largest value [], and how many are strictly larger."""
    total = sum(scores.numel() for scores in lists)
    if total <= TOP_K_CHUNK:
        above, between = 0, torch.cat(list(lists))
    else:
        low, high = _bracket(lists, k, total)
        above, between = _split(lists, low, high, most=max(TOP_K_CHUNK, k // 2))
    if above < k <= above + between.numel():
        threshold = between.topk(k - above, sorted=False).values.min()
        return threshold, above + int((between > threshold).count_nonzero())
    threshold = _by_counting(lists, k)
    return threshold, _count(lists, threshold, torch.gt)


def _bracket(lists: Sequence[Tensor], k: int, total: int) -> tuple[Tensor, Tensor]:
    """Two values between which the k-th largest most likely lies.

    Every n-th score is read. Of p scores, p * k / total are expected among the k largest, with the square root of that
    as standard deviation.
    """
    stride = max(1, total // PILOT) | 1  # odd: not in step with the columns of a matrix
    pilot = torch.cat([scores[::stride] for scores in lists])
    expected = pilot.numel() * k / total
    spread = _SPREAD * expected**0.5 + 1
    deepest, first = min(pilot.numel(), int(expected + spread) + 1), int(expected - spread)
    ranked = pilot.topk(deepest).values
    low = ranked[-1] if deepest < pilot.numel() else torch.zeros_like(ranked[-1])
    return low, ranked[first - 1] if first > 0 else torch.full_like(low, math.inf)


def _split(lists: Sequence[Tensor], low: Tensor, high: Tensor, most: int) -> tuple[int, Tensor]:
    """How many scores are above ``high``, and those from ``low`` to ``high``; more than ``most`` are not collected."""
    between, held = [lists[0][:0]], 0
    for scores in lists:
        for _, chunk in _chunks(scores):
            between.append(chunk[(chunk >= low) & (chunk <= high)])
            held += between[-1].numel()
            if held > most:
                return 0, lists[0][:0]
    return _count(lists, high, torch.gt), torch.cat(between)


def _by_counting(lists: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest value, bit by bit: the bits of floats that are not negative are ordered as the floats are."""
    bits = 0
    for bit in reversed(range(31)):
        if _count(lists, _float(bits | 1 << bit, lists[0]), torch.ge) >= k:
            bits |= 1 << bit
    return _float(bits, lists[0])


def _float(bits: int, like: Tensor) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32, device=like.device).view(torch.float32)


def _count(lists: Sequence[Tensor], value: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> int:
    """How many scores compare so with ``value``; NaN compares with none."""
    return sum(int(compare(chunk, value).count_nonzero()) for scores in lists for _, chunk in _chunks(scores))


class MatrixPicker:
    """The best positions of each matrix, each with its own count.

    Args:
        counts: Path -> positions to pick.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts
        self._positions: dict[str, Tensor] = {}

    def add(self, path: str, scores: Tensor, positions: Tensor | None = None) -> None:
        """Pick from one matrix's scores, which may be freed afterwards.

        Args:
            path: The matrix.
            scores: [N, K], or [n] at ``positions``.
            positions: Flat positions of the scores, int64 [n], rising; all of the matrix where None.
        """
        chosen = top_positions(scores, self._counts[path])
        self._positions[path] = (chosen if positions is None else positions[chosen]).cpu()

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

    def add(self, path: str, scores: Tensor, positions: Tensor | None = None) -> None:
        """Keep what of one matrix's scores may still be among the model's best; see ``MatrixPicker.add``."""
        flat = scores.reshape(-1)
        better = flat > self._floor
        many = int(better.count_nonzero()) > self._total
        chosen = top_positions(flat, self._total) if many else better.nonzero().flatten()
        self._names.append(path)
        self._scores.append(flat[chosen].cpu())
        self._positions.append((chosen if positions is None else positions[chosen]).cpu())
        if sum(kept.numel() for kept in self._scores) > 2 * self._total:
            self._compact()

    def _compact(self) -> None:
        """Drop all but the best ``total`` candidates; later matrices must be strictly better than the worst kept."""
        held = sum(kept.numel() for kept in self._scores)
        best = cut(self._scores, min(self._total, held))
        for index, scores in enumerate(self._scores):
            mine = best.positions(scores)
            self._positions[index] = self._positions[index][mine]
            self._scores[index] = scores[mine]
        if held >= self._total and self._total:
            self._floor = min(float(kept.min()) for kept in self._scores if kept.numel())

    def result(self) -> dict[str, Tensor]:
        """Path -> flat positions, int64, rising, on the CPU; ``total`` of them in sum."""
        if self._scores:
            self._compact()
        found = dict(zip(self._names, self._positions, strict=True))
        return {path: found.get(path, torch.arange(0)) for path in self._paths}
