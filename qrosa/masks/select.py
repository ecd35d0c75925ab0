"""Mask selection: which positions of each matrix get a sparse value.

A score (``scores``) ranks the positions: by a statistic of gradients, by the quantisation error, by both, or by none.
The statistic is collected in one of two ways: ``exact``, dense, for as many matrices at a time as there is memory for,
which reads the same samples once a group of matrices; or ``stream``, in one pass, with sums at the best positions only.
Masks of the first are bit-equal for any grouping; the second depends on the number of candidates alone. Left open, the
way is exact where that takes one pass within a given bound, since then nothing is given up, else stream; with no bound
it is exact, so that masks never depend on what memory happens to be free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.base_files import BaseFiles
from qrosa.config import MaskConfig
from qrosa.errors import InputError, TrainingError
from qrosa.heap import look
from qrosa.masks.candidates import MatrixCandidates, ModelCandidates, ReadError
from qrosa.masks.exact import exact_statistics
from qrosa.masks.observe import Advance
from qrosa.masks.passes import STATISTIC_BYTES, group_matrices
from qrosa.masks.random_masks import random_positions
from qrosa.masks.residual import checkpoint_of, residual
from qrosa.masks.scores import MASK_SCORES, MaskScore
from qrosa.masks.selection_rows import SampleLoss, read_samples, sample_loss
from qrosa.masks.sizes import CANDIDATE_FACTOR, candidates_of, candidates_of_model
from qrosa.masks.stream import streamed_statistics
from qrosa.masks.topk import MatrixPicker, ModelPicker
from qrosa.quantities import parse_size

_FREE_SHARE = 0.4
Collected = tuple[str, Tensor | None, Tensor]
"""Path, flat positions (None for all of the matrix), and the statistic there."""


def choose_positions(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    config: MaskConfig,
    nnz: Mapping[str, int],
    seed: int,
    group_bytes: int | None = None,
    candidate_factor: int | None = None,
    progress: Advance | None = None,
    loss: SampleLoss = sample_loss,
    base_files: BaseFiles | None = None,
) -> dict[str, Tensor]:
    """Choose the positions of the sparse part.

    Args:
        model: A loaded base, with whatever adapters it has; left exactly as it was.
        samples: Encoded rows or batches (see ``read_samples``); the first ``config.mask_samples`` are used. Not read
            for the scores residual and random.
        config: Score, scope, number of samples, way.
        nnz: Path -> positions to choose. With scope ``global`` only their sum counts, and the paths say where.
        seed: Of the random score.
        group_bytes: Most bytes of exact statistics at a time; default ``config.mask_memory``, else what is free.
        candidate_factor: Streamed candidates for each position; default a middling one.
        progress: Called with (samples done, samples to do) over all passes.
        loss: Mean loss of one sample; give one that chunks the head where long rows carry loss on every token.
        base_files: The 16-bit weights for the scores that use R; default the base's own source.

    Returns:
        Path -> flat positions ``row * K + column``, int64, rising, on the CPU.

    Raises:
        InputError: Counts that do not fit the model, no supervised token, or no 16-bit weights for a residual.
        DoesNotFitError: One matrix's exact statistic is larger than the bound.
        TrainingError: A loss or score is not finite, or all gradients are zero.
    """
    layers = _chosen_layers(model, nnz)
    counts = {path: nnz[path] for path in layers}
    score, sizes = MASK_SCORES[config.mask_score], _sizes(layers)
    if score.rank is None:
        return random_positions(sizes, counts, config.mask_scope, seed)
    if score.reads_error:
        base_files = base_files or checkpoint_of(model)

    def read_error(path: str) -> Tensor:
        assert base_files is not None
        return residual(base_files, path, layers[path].weight.to(layers[path].device))

    whole = config.mask_scope == "global"
    picker = ModelPicker(list(layers), sum(counts.values())) if whole else MatrixPicker(counts)
    if not score.reads_gradients:
        _pick_by_error(picker, score, layers, read_error, progress)
        return picker.result()
    observed = {path: layer for path, layer in layers.items() if whole or counts[path]}
    rows = read_samples(samples, config.mask_samples)
    groups = _exact_groups(config, observed, group_bytes)
    if groups is not None:
        collected = exact_statistics(model, observed, groups, rows, score.squares, loss, progress)
    else:
        candidates = _candidates(observed, counts, score, candidate_factor, read_error, whole=whole)
        collected = streamed_statistics(model, observed, candidates, rows, loss, progress)
    _pick(picker, score, collected, read_error)
    return picker.result()


def _pick_by_error(
    picker: MatrixPicker | ModelPicker,
    score: MaskScore,
    layers: Mapping[str, QRosaLinear],
    read_error: ReadError,
    progress: Advance | None,
) -> None:
    """Pick by the quantisation error alone."""
    assert score.rank is not None
    for done, path in enumerate(layers, 1):
        picker.add(path, score.rank(None, read_error(path)))
        if progress:
            progress(done, len(layers))


def _exact_groups(
    config: MaskConfig, layers: Mapping[str, QRosaLinear], group_bytes: int | None
) -> list[list[str]] | None:
    """The matrices whose exact statistics are collected together, pass by pass; None where one pass streams."""
    if config.mask_selection == "stream":
        return None
    sizes = _sizes(layers)
    limit = group_bytes or (parse_size(config.mask_memory, "--mask-memory") if config.mask_memory else None)
    if config.mask_selection is None and limit is not None and sum(sizes.values()) * STATISTIC_BYTES > limit:
        return None
    return group_matrices(sizes, limit or default_group_bytes(layers, sizes))


def _candidates(
    layers: Mapping[str, QRosaLinear],
    counts: Mapping[str, int],
    score: MaskScore,
    factor: int | None,
    read_error: ReadError,
    *,
    whole: bool,
) -> MatrixCandidates:
    """An empty list of candidates, for each matrix or for the model."""
    factor, sizes = factor or CANDIDATE_FACTOR, _sizes(layers)
    if whole:
        return ModelCandidates(layers, score, candidates_of_model(counts, sizes, factor), read_error)
    return MatrixCandidates(layers, score, candidates_of(counts, sizes, factor), read_error)


def _sizes(layers: Mapping[str, QRosaLinear]) -> dict[str, int]:
    return {path: layer.in_features * layer.out_features for path, layer in layers.items()}


def _pick(
    picker: MatrixPicker | ModelPicker, score: MaskScore, collected: Iterable[Collected], read_error: ReadError
) -> None:
    """Rank each statistic and pick from it."""
    assert score.rank is not None
    highest = 0.0
    for path, positions, statistic in collected:
        if not statistic.numel():
            continue
        look()
        extremes = [abs(float(value)) for value in statistic.aminmax()]
        if not all(map(math.isfinite, extremes)):
            raise TrainingError(f"the mask score of {path} is not finite", "check the rows and the base for NaN")
        highest = max(highest, *extremes)
        error = read_error(path) if score.reads_error else None
        if error is not None and positions is not None:
            error = error.view(-1)[positions]
        picker.add(path, score.rank(statistic, error), positions)
    if not highest:
        raise TrainingError(
            "every gradient is zero, so no position is better than another",
            "check that the selection rows have supervised tokens and that the base is not damaged",
        )


def default_group_bytes(layers: Mapping[str, QRosaLinear], sizes: Mapping[str, int]) -> int:
    """A bound when none is given: a share of the memory that is free, and never less than the largest matrix."""
    device = next((layer.device for layer in layers.values()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(int(free * _FREE_SHARE), STATISTIC_BYTES * max(sizes.values(), default=0))


def _chosen_layers(model: nn.Module, nnz: Mapping[str, int]) -> dict[str, QRosaLinear]:
    """The layers that ``nnz`` names, in model order, their counts checked."""
    layers = quantized_linears(model)
    for path, count in nnz.items():
        if path not in layers:
            raise InputError(f"the model has no quantised layer {path!r}", "take counts made for this model")
        size = layers[path].in_features * layers[path].out_features
        if not 0 <= count <= size:
            raise InputError(
                f"{count} sparse positions do not fit the {size} weights of {path}", "use a density of at most 50%"
            )
    return {path: layer for path, layer in layers.items() if path in nnz}
