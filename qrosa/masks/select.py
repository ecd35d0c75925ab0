"""Mask selection: which positions of each matrix get a sparse value.

Five scores rank the positions of a weight W with quantisation error R = W - deq(Wq); g is the gradient of one
sample's mean loss over its supervised tokens, without dropout:

    squared    mean over samples of g^2, the diagonal of the empirical Fisher: the paper's (RoSA, arXiv 2401.04679)
    mean       |mean over samples of g|
    repair     |R| |mean over samples of g|, what repairing one error is worth to first order
    residual   |R|
    random     nothing; the control that every claim about masks has to beat

Gradient scores are dense [N, K] in fp32, so they are collected for one group of layers at a time (``groups``),
reading the same samples once a group; backward ends at the group's first layer. The gradient of a sample does not
depend on which layers are observed, and top-k is exact (``topk``): masks are bit-equal for any grouping. Counts of
samples cancel in every ranking, so sums stand for means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.base_files import BaseFiles
from qrosa.config import MaskConfig
from qrosa.errors import InputError, TrainingError
from qrosa.masks.accumulate import observe
from qrosa.masks.draw import random_positions
from qrosa.masks.groups import group_matrices
from qrosa.masks.residual import checkpoint_of, residual
from qrosa.masks.samples import Sample, SampleLoss, quiet, read_samples, sample_loss
from qrosa.masks.topk import MatrixPicker, ModelPicker
from qrosa.quantities import parse_size

Progress = Callable[[int, int], None]
_FREE_SHARE = 0.4


def select_masks(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    config: MaskConfig,
    nnz: Mapping[str, int],
    seed: int,
    group_bytes: int | None = None,
    progress: Progress | None = None,
    loss: SampleLoss = sample_loss,
    base_files: BaseFiles | None = None,
) -> dict[str, Tensor]:
    """Choose the positions of the sparse part.

    Args:
        model: A loaded base, with whatever adapters it has; left exactly as it was.
        samples: Encoded rows or batches (see ``read_samples``); the first ``config.mask_samples`` are used. Not read
            for the scores residual and random.
        config: Score, scope, number of samples.
        nnz: Path -> positions to choose. With scope ``global`` only their sum counts, and the paths say where.
        seed: Of the random score.
        group_bytes: Most bytes of statistics at a time; default ``config.mask_memory``, else what is free.
        progress: Called with (samples done, samples to do) over all passes.
        loss: Mean loss of one sample; give one that chunks the head where long rows carry loss on every token.
        base_files: The 16-bit weights for the scores that use R; default the base's own source.

    Returns:
        Path -> flat positions ``row * K + column``, int64, rising, on the CPU.

    Raises:
        InputError: Counts that do not fit the model, no supervised token, or no 16-bit weights for a residual.
        DoesNotFitError: One matrix's statistic is larger than the bound.
        TrainingError: A loss or score is not finite, or all gradients are zero.
    """
    layers = _chosen_layers(model, nnz)
    counts = {path: nnz[path] for path in layers}
    if config.mask_score == "random":
        return random_positions(_sizes(layers), counts, config.mask_scope, seed)
    if config.mask_score in ("residual", "repair"):
        base_files = base_files or checkpoint_of(model)
    picker = MatrixPicker(counts) if config.mask_scope == "matrix" else ModelPicker(list(layers), sum(counts.values()))
    if config.mask_score == "residual":
        assert base_files is not None
        _pick_by_error(picker, layers, base_files, progress)
    else:
        groups = _groups(config, layers, counts, group_bytes)
        rows = read_samples(samples, config.mask_samples)
        collected = _collect(model, layers, groups, rows, config.mask_score == "squared", loss, progress)
        _pick(picker, collected, layers, base_files if config.mask_score == "repair" else None)
    return picker.result()


def _pick_by_error(
    picker: MatrixPicker | ModelPicker,
    layers: Mapping[str, QRosaLinear],
    base_files: BaseFiles,
    progress: Progress | None,
) -> None:
    """Pick the largest quantisation errors."""
    for done, (path, layer) in enumerate(layers.items(), 1):
        picker.add(path, residual(base_files, path, layer.weight.to(layer.device)).abs_())
        if progress:
            progress(done, len(layers))


def _groups(
    config: MaskConfig, layers: Mapping[str, QRosaLinear], counts: Mapping[str, int], group_bytes: int | None
) -> list[list[str]]:
    """The matrices that positions may be picked from, as many at a time as their statistics have room for."""
    wanted = {path: size for path, size in _sizes(layers).items() if config.mask_scope == "global" or counts[path]}
    limit = group_bytes or (parse_size(config.mask_memory, "--mask-memory") if config.mask_memory else None)
    return group_matrices(wanted, limit or default_group_bytes(layers, wanted))


def _sizes(layers: Mapping[str, QRosaLinear]) -> dict[str, int]:
    return {path: layer.in_features * layer.out_features for path, layer in layers.items()}


def _collect(
    model: nn.Module,
    layers: Mapping[str, QRosaLinear],
    groups: list[list[str]],
    rows: list[Sample],
    square: bool,
    loss: SampleLoss,
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    """(path, statistic) in model order, by one pass over the samples a group; used statistics are freed."""
    for number, group in enumerate(groups):
        statistics = {path: _zeros(layers[path]) for path in group}
        observed = {path: layers[path] for path in group}
        report = progress and partial(_report, progress, number * len(rows), len(groups) * len(rows))
        accumulate(model, observed, statistics, rows, square, loss, report)
        for path in group:
            yield path, statistics.pop(path)


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _pick(
    picker: MatrixPicker | ModelPicker,
    collected: Iterable[tuple[str, Tensor]],
    layers: Mapping[str, QRosaLinear],
    repaired_from: BaseFiles | None,
) -> None:
    """Turn each statistic into scores, in place, and pick from them."""
    highest_of_all = 0.0
    paths = 0
    for path, scores in collected:
        scores.abs_()  # changes nothing where gradients were squared
        highest = float(scores.max())
        if not math.isfinite(highest):
            raise TrainingError(f"the mask score of {path} is not finite", "check the rows and the base for NaN")
        highest_of_all = max(highest_of_all, highest)
        paths += 1
        if repaired_from is not None:
            scores.mul_(residual(repaired_from, path, layers[path].weight).abs_())
        picker.add(path, scores)
    if paths and not highest_of_all:
        raise TrainingError(
            "every gradient is zero, so no position is better than another",
            "check that the selection rows have supervised tokens and that the base is not damaged",
        )


def accumulate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, Tensor],
    rows: list[Sample],
    square: bool,
    loss: SampleLoss = sample_loss,
    done: Callable[[int], None] | None = None,
) -> None:
    """Add every sample's gradient (squared or not) to the statistics of ``layers``.

    Args:
        model: The whole model.
        layers: Path -> linear layer to observe.
        statistics: Path -> fp32 [N, K].
        rows: Samples with at least one supervised token.
        square: Square each sample's gradient before it is added.
        loss: Mean loss of one sample.
        done: Called with the number of samples done after each.

    Raises:
        TrainingError: A sample's loss is not finite.
    """
    with observe(layers, statistics, square) as anchor:
        run_backward(model, rows, anchor, loss, done)


def run_backward(
    model: nn.Module,
    rows: list[Sample],
    anchor: Tensor,
    loss: SampleLoss = sample_loss,
    done: Callable[[int], None] | None = None,
) -> None:
    """One forward and backward pass a sample, without dropout, for whoever observes layers under ``anchor``.

    Raises:
        TrainingError: A sample's loss is not finite.
    """
    with quiet(model), torch.enable_grad():
        for number, sample in enumerate(rows, 1):
            value = loss(model, sample)
            if not math.isfinite(float(value.detach())):
                raise TrainingError(
                    f"the loss of selection row {number} is {float(value.detach())}",
                    "lower the learning rate if this came after warm-up, else check the base",
                )
            torch.autograd.grad(value, anchor, allow_unused=True)
            del value
            if done:
                done(number)


def default_group_bytes(layers: Mapping[str, QRosaLinear], sizes: Mapping[str, int]) -> int:
    """A bound when none is given: a share of the memory that is free, and never less than the largest matrix.

    The masks do not depend on it, only the number of passes does.
    """
    device = next((layer.device for layer in layers.values()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(int(free * _FREE_SHARE), 4 * max(sizes.values(), default=0))


def _zeros(layer: QRosaLinear) -> Tensor:
    return torch.zeros(layer.weight.shape, dtype=torch.float32, device=layer.device)


def _chosen_layers(model: nn.Module, nnz: Mapping[str, int]) -> dict[str, QRosaLinear]:
    """The layers that ``nnz`` names, in model order, their counts checked."""
    layers = quantized_linears(model)
    for path, count in nnz.items():
        if path not in layers:
            raise InputError(
                f"the model has no quantised layer {path!r}",
                "take counts made for this model",
            )
        size = layers[path].in_features * layers[path].out_features
        if not 0 <= count <= size:
            raise InputError(
                f"{count} sparse positions do not fit the {size} weights of {path}",
                "use a density of at most 50%",
            )
    return {path: layer for path, layer in layers.items() if path in nnz}
