"""The exact statistic of a mask: dense, fp32 [N, K], for one group of matrices after another.

As many passes over the samples as there are groups (``passes``); backward ends at the group's first layer. A sample's
gradient does not depend on which layers are observed, so statistics are bit-equal for any grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qrosa import ops
from qrosa.adapters.linear import QRosaLinear
from qrosa.masks.observe import Advance, Receiver, observe, run_backward
from qrosa.masks.selection_rows import Sample, SampleLoss, sample_loss


def exact_statistics(
    model: nn.Module,
    layers: Mapping[str, QRosaLinear],
    groups: list[list[str]],
    rows: list[Sample],
    square: bool,
    loss: SampleLoss = sample_loss,
    progress: Advance | None = None,
) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(path, None, statistic fp32 [N, K]) in model order; a statistic may be freed once it was used.

    Args:
        model: The whole model.
        layers: Path -> linear layer with a ``weight`` of shape [N, K].
        groups: Paths whose statistics exist together.
        rows: Samples with at least one supervised token.
        square: Square each sample's gradient before it is added.
        loss: Mean loss of one sample.
        progress: Called with (samples done, samples to do) over all passes.

    Raises:
        TrainingError: A sample's loss is not finite.
    """
    total = len(groups) * len(rows)
    for number, group in enumerate(groups):
        observed = {path: layers[path] for path in group}
        statistics = {path: _zeros(layer) for path, layer in observed.items()}

        def done(count: int, before: int = number * len(rows)) -> None:
            if progress:
                progress(before + count, total)

        accumulate(model, observed, statistics, rows, square, loss, done)
        for path in group:
            yield path, None, statistics.pop(path)


def accumulate(
    model: nn.Module,
    layers: Mapping[str, QRosaLinear],
    statistics: Mapping[str, Tensor],
    rows: list[Sample],
    square: bool,
    loss: SampleLoss = sample_loss,
    done: Callable[[int], None] | None = None,
) -> None:
    """Add every sample's gradient (squared or not) to the statistics of ``layers``, path -> fp32 [N, K]."""
    receivers = {path: adding_to(statistics[path], square) for path in layers}
    with observe(layers, receivers) as anchor:
        run_backward(model, rows, anchor, loss, done)


def adding_to(statistic: Tensor, square: bool) -> Receiver:
    """Adds dY^T @ X, or its square, to a statistic fp32 [N, K].

    What is squared is the gradient of one call of the layer: with one sample a forward pass, of one sample.
    """

    def add(dy: Tensor, x: Tensor) -> None:
        ops.score_accumulate(dy, x, statistic, square)

    return add


def _zeros(layer: QRosaLinear) -> Tensor:
    return torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.device)
