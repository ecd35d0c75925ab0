"""Mask selection in one call from Python: choose the positions, and put a sparse part on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qrosa.config import AdapterConfig, MaskConfig
from qrosa.errors import InputError
from qrosa.masks.observe import Advance
from qrosa.masks.repair import set_masks
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import SampleLoss, sample_loss


def select_masks(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    config: MaskConfig | None = None,
    nnz: Mapping[str, int] | None = None,
    seed: int = 42,
    progress: Advance | None = None,
    loss: SampleLoss = sample_loss,
    agreed: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Choose where the sparse part sits, and add it to the model's layers, in place of one they may have.

    Args:
        model: A model from ``qrosa.load``.
        batches: Mappings of ``input_ids`` [B, L], ``labels`` [B, L] and perhaps ``attention_mask`` [B, L], or single
            rows of the same. Every row counts alike, however it is batched; padding is removed. The first
            ``config.mask_samples`` rows are used.
        config: How positions are scored; default squared gradients, per matrix, 64 rows.
        nnz: Path -> number of positions; default what the model's budget gave each layer.
        seed: Of the random score.
        progress: Called with (steps done, steps in all).
        loss: Mean loss of one row; give one that chunks the head where rows are long.
        agreed: Given this process's choice, what all of several processes take.

    Returns:
        Path -> flat positions ``row * K + column``, int64, rising, on the CPU.

    Raises:
        InputError: No counts, counts that do not fit, or no supervised token.
        TrainingError: A loss is not finite, or all gradients are zero.
    """
    nnz = _budget_of(model) if nnz is None else nnz
    if not any(nnz.values()):
        raise InputError(
            "the model has no budget for a sparse part",
            'load it with one, as in qrosa.AdapterConfig(budget="0.3%"), or pass nnz={path: count}',
        )
    settings: AdapterConfig | None = getattr(model, "qrosa_adapter", None)
    positions = choose_positions(
        model, batches, config=config or MaskConfig(), nnz=nnz, seed=seed, progress=progress, loss=loss
    )
    if agreed is not None:
        positions = agreed(positions)
    notices = set_masks(
        model,
        positions,
        init=settings.sparse_init if settings else "residual",
        low_rank_repairs=settings is not None and settings.low_rank_init == "svd",
    )
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    return positions


def _budget_of(model: nn.Module) -> Mapping[str, int]:
    """What the budget that the model was loaded with gave each layer."""
    allocation = getattr(model, "qrosa_allocation", None)
    return dict(allocation.nnz) if allocation is not None else {}
