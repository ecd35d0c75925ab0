"""The best positions of a statistic that is still being added up: positions and sums of each matrix, nothing else.

Six bytes a candidate in the layout of the delta itself, so that ``sddmm`` can add to them, and one dense scratch for
the largest matrix. Where the model's best positions are wanted, matrices share one limit: each keeps what is above the
worst candidate so far, up to a few times its share, and all of them are cut back when they grow past the limit by a
quarter, and after each dense sample. Matrices come in the order of backward, so what is kept is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qrosa import ops
from qrosa.adapters.linear import QRosaLinear
from qrosa.errors import TrainingError
from qrosa.masks.scores import MaskScore
from qrosa.masks.sizes import POOL_SLACK, largest_shares
from qrosa.masks.topk import cut, top_positions
from qrosa.sparse.csr import CsrDelta

ReadError = Callable[[str], Tensor]
"""Path -> the quantisation error of a matrix, fp32 [N, K]."""


class MatrixCandidates:
    """Candidates of each matrix, each with its own limit.

    Args:
        layers: Path -> linear layer, in model order.
        score: What ranks positions.
        limits: Path -> most candidates.
        read_error: Called where the score reads the error.
    """

    def __init__(
        self, layers: Mapping[str, QRosaLinear], score: MaskScore, limits: Mapping[str, int], read_error: ReadError
    ) -> None:
        self._layers, self._score, self._limits, self._read_error = layers, score, limits, read_error
        self._kept: dict[str, CsrDelta] = {}
        largest = max(layers.values(), key=lambda layer: layer.in_features * layer.out_features)
        self._scratch = torch.empty(largest.in_features * largest.out_features, device=largest.device)

    def look(self, path: str, dy: Tensor, x: Tensor) -> None:
        """Form the whole gradient of one call of a layer, and keep the best of the statistic with it.

        Args:
            path: The layer.
            dy: [T, N].
            x: [T, K].

        Raises:
            TrainingError: A score is not finite.
        """
        statistic = self._recall(path)
        ops.score_accumulate(dy, x, statistic, self._score.squares)
        assert self._score.rank is not None
        scores = self._score.rank(statistic, self._read_error(path) if self._score.reads_error else None)
        if not bool(scores.max().isfinite()):
            raise TrainingError(f"the mask score of {path} is not finite", "check the rows and the base for NaN")
        self._keep(path, statistic.view(-1), scores.view(-1))

    def add(self, path: str, dy: Tensor, x: Tensor) -> None:
        """Add one call's gradient at the candidates; a layer that no gradient had reached so far is looked at."""
        kept = self._kept.get(path)
        if kept is None:
            return self.look(path, dy, x)
        gradient = ops.sddmm(dy, x, kept.row_ptr, kept.col)
        if self._score.squares:
            kept.values.addcmul_(gradient, gradient)
        else:
            kept.values.add_(gradient)

    def end_sample(self) -> None:
        """A dense sample has passed through all layers."""

    def end_looking(self) -> None:
        """From here on candidates are only added to."""
        self._scratch = self._scratch[:0].clone()

    def take(self, path: str) -> CsrDelta:
        """The candidates of a matrix with their sums, forgotten here."""
        kept = self._kept.pop(path, None)
        if kept is None:  # no gradient has ever reached it: as good as any
            shape, device = self._layers[path].weight.shape, self._layers[path].device
            return CsrDelta.from_positions(torch.arange(self._limits[path], device=device), shape)
        return kept

    def _recall(self, path: str) -> Tensor:
        """What is left of a matrix's statistic, dense [N, K] in the scratch."""
        layer = self._layers[path]
        size = layer.in_features * layer.out_features
        if size > self._scratch.numel():
            self._scratch = torch.empty(size, device=layer.device)
        statistic = self._scratch[:size].zero_()
        if path in self._kept:
            statistic[self._kept[path].positions()] = self._kept[path].values
        return statistic.view(layer.weight.shape)

    def _keep(self, path: str, statistic: Tensor, scores: Tensor) -> None:
        self._store(path, top_positions(scores, self._limits[path]), statistic)

    def _store(self, path: str, positions: Tensor, statistic: Tensor) -> None:
        shape = self._layers[path].weight.shape
        self._kept[path] = CsrDelta.from_positions(positions, (shape[0], shape[1]), statistic[positions])


class ModelCandidates(MatrixCandidates):
    """Candidates of the whole model under one limit.

    Args:
        layers: Path -> linear layer, in model order.
        score: What ranks positions.
        limit: Most candidates over all matrices.
        read_error: Called where the score reads the error.
    """

    def __init__(self, layers: Mapping[str, QRosaLinear], score: MaskScore, limit: int, read_error: ReadError) -> None:
        sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
        super().__init__(layers, score, largest_shares(limit, sizes), read_error)
        self._limit = limit
        self._scores: dict[str, Tensor] = {}
        self._floor = float("-inf")

    def _keep(self, path: str, statistic: Tensor, scores: Tensor) -> None:
        better = scores > self._floor
        if path in self._kept:
            better[self._kept[path].positions()] = True
        many = int(better.count_nonzero()) > self._limits[path]
        positions = top_positions(scores, self._limits[path]) if many else better.nonzero().flatten()
        self._store(path, positions, statistic)
        values = self._kept[path].values
        self._scores[path] = values if scores.data_ptr() == statistic.data_ptr() else scores[positions]
        if sum(kept.nnz for kept in self._kept.values()) > POOL_SLACK * self._limit:
            self.end_sample()

    def end_sample(self) -> None:
        """Cut the candidates back to the limit."""
        paths = [path for path in self._layers if path in self._scores]
        held = sum(self._scores[path].numel() for path in paths)
        if held < self._limit:
            return
        best = cut([self._scores[path] for path in paths], self._limit)
        for path in paths:
            scores, kept = self._scores[path], self._kept[path]
            mine = best.positions(scores)
            cut_back = CsrDelta.from_positions(kept.positions()[mine], kept.shape, kept.values[mine])
            self._kept[path] = cut_back
            self._scores[path] = cut_back.values if scores is kept.values else scores[mine]
        self._floor = min(float(each.min()) for each in self._scores.values() if each.numel())

    def end_looking(self) -> None:
        """From here on candidates are only added to."""
        super().end_looking()
        self._scores = {}
