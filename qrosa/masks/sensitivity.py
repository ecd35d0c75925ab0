"""How sensitive the loss is to each matrix: what ranks are given by, where a budget cannot give one to all.

A matrix's sensitivity is the mean over samples of ||g||^2, with g [N, K] the gradient of one sample's mean loss and
|| || the Frobenius norm: the trace of its block of the empirical Fisher, and the sum of the score that masks are
picked by. ``allocate`` divides it by N + K, what a rank costs. It stands for what a rank may gain, and is not
that: one rank follows one direction of g, and a step of AdamW does not grow with the size of g.

Only the norm is wanted, so g is never formed. It is dY^T X, and with the Gram matrices of its factors

    ||dY^T X||^2  =  sum over tokens s, t of (dY dY^T)[s, t] (X X^T)[s, t]

which is exact, takes T^2 (N + K) multiplications instead of T N K (fewer for rows shorter than N K / (N + K)), and,
tile by tile, memory for a few hundred tokens instead of a statistic [N, K]. All matrices are therefore measured in one
pass, whatever the memory; adding up masks' statistics would read the samples once a group of layers. The cheaper
sum over tokens of ||dy_t||^2 ||x_t||^2 leaves out s != t, which is most of it where tokens agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.errors import TrainingError
from qrosa.masks.observe import Advance, Receiver, observe, run_backward
from qrosa.masks.selection_rows import SampleLoss, read_samples, sample_loss
from qrosa.masks.sizes import GRAM_TILE


def measure_sensitivity(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    limit: int | None = None,
    loss: SampleLoss = sample_loss,
    progress: Advance | None = None,
) -> dict[str, float]:
    """Mean squared norm of each matrix's gradient.

    Args:
        model: A loaded base, with whatever adapters it has; left exactly as it was.
        samples: Encoded rows or batches (see ``read_samples``).
        limit: Most samples to use.
        loss: Mean loss of one sample.
        progress: Called with (samples done, samples to do).

    Returns:
        Path -> sensitivity, in model order; 0 for a matrix that no gradient reaches.

    Raises:
        InputError: No supervised token.
        TrainingError: A loss or a gradient is not finite, or all gradients are zero.
    """
    layers = quantized_linears(model)
    totals = {path: torch.zeros((), dtype=torch.float64, device=layer.device) for path, layer in layers.items()}
    rows = read_samples(samples, limit)

    def adding(total: Tensor) -> Receiver:
        def add(dy: Tensor, x: Tensor) -> None:
            total.add_(squared_norm(dy, x))

        return add

    def done(number: int) -> None:
        if progress:
            progress(number, len(rows))

    with observe(layers, {path: adding(total) for path, total in totals.items()}) as anchor:
        run_backward(model, rows, anchor, loss, done)
    found = {path: float(total) / len(rows) for path, total in totals.items()}
    for path, value in found.items():
        if not math.isfinite(value):
            raise TrainingError(f"the sensitivity of {path} is not finite", "check the rows and the base for NaN")
    if not any(found.values()):
        raise TrainingError(
            "every gradient is zero, so no matrix is more sensitive than another",
            "check that the rows have supervised tokens and that the base is not damaged",
        )
    return found


def squared_norm(dy: Tensor, x: Tensor, tile: int = GRAM_TILE) -> Tensor:
    """||dY^T X||^2 in the Frobenius norm, products in fp32, their sum in fp64.

    Args:
        dy: [T, N], any float type.
        x: [T, K].
        tile: Tokens that are multiplied with tokens at a time; pairs of tiles that mirror each other count twice.

    Returns:
        fp64 [], on the tensors' device.
    """
    total = torch.zeros((), dtype=torch.float64, device=dy.device)
    for start in range(0, len(dy), tile):
        dy_here, x_here = dy[start : start + tile].float(), x[start : start + tile].float()
        for other in range(start, len(dy), tile):
            dy_there, x_there = dy[other : other + tile].float(), x[other : other + tile].float()
            products = (dy_here @ dy_there.T).mul_(x_here @ x_there.T)
            total += products.sum(dtype=torch.float64) * (1 if other == start else 2)
    return total
