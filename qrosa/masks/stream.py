"""The statistic of a mask in one pass, whatever the memory: only the best positions keep theirs.

A dense statistic of every matrix does not fit, and collecting it group by group reads the samples once a group. Here
every matrix is observed at once. For the first few samples (*dense* samples) the gradient dY^T @ X of a matrix is
formed in one scratch that all matrices share, on top of what was kept of the matrix's statistic. The best of it, a few
times as many *candidates* as the mask has positions, are kept, and the rest is forgotten: a newcomer starts with what
this sample gives it. From then on ``sddmm`` adds to the candidates only. With as many candidates as weights this is
the exact statistic.

What it gives up: a position that was never among the best of the dense samples' sums. Sums over a few samples rank
alike because gradients of one base on one kind of text resemble each other; how alike is measured in
bench/bench_selection.py. The designs not taken: a mask from fewer samples, read exactly, is far worse for the same
time; adding up during the last warm-up steps costs no pass, but a micro-batch is several samples, under dropout and
with moving weights, and the mask would depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from qrosa.adapters.linear import QRosaLinear
from qrosa.heap import look
from qrosa.masks.candidates import MatrixCandidates
from qrosa.masks.observe import Advance, Receiver, observe, run_backward
from qrosa.masks.selection_rows import Sample, SampleLoss, sample_loss
from qrosa.masks.sizes import DENSE_SAMPLES


def streamed_statistics(
    model: nn.Module,
    layers: Mapping[str, QRosaLinear],
    candidates: MatrixCandidates,
    rows: list[Sample],
    loss: SampleLoss = sample_loss,
    progress: Advance | None = None,
    dense_samples: int = DENSE_SAMPLES,
) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(path, flat positions int64 [n], statistic fp32 [n]) of every matrix's candidates, in model order.

    Args:
        model: The whole model.
        layers: Path -> linear layer.
        candidates: Keeps the best of these layers; not used before.
        rows: Samples with at least one supervised token.
        loss: Mean loss of one sample.
        progress: Called with (samples done, samples to do).
        dense_samples: Samples whose whole gradient is looked at.

    Raises:
        TrainingError: A sample's loss, or a score, is not finite.
    """
    seen = 0

    def receiver(path: str) -> Receiver:
        def receive(dy: Tensor, x: Tensor) -> None:
            look()
            take_in = candidates.look if seen < dense_samples else candidates.add
            take_in(path, dy, x)

        return receive

    def done(count: int) -> None:
        nonlocal seen
        seen = count
        if count <= dense_samples:
            candidates.end_sample()
        if count == dense_samples:
            candidates.end_looking()
        if progress:
            progress(count, len(rows))

    with observe(layers, {path: receiver(path) for path in layers}) as anchor:
        run_backward(model, rows, anchor, loss, done)
    for path in layers:
        kept = candidates.take(path)
        yield path, kept.positions(), kept.values
