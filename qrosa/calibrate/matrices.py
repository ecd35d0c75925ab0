"""The matrices of one decoder block, from 16 to 4 bits: what happens while the block visits the device.

Matrices that read the same input are rounded as one, stacked along N: they share the second moments and their factor.
Where a low-rank part is wanted, rounding and fit alternate: W is rounded, L is fitted to what is left, W - L is
rounded anew, and L fitted once more (CALDERA, arXiv 2405.18886, alternates alike).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qrosa.heap import look
from qrosa.quant.feedback import round_with_feedback
from qrosa.quant.hessian import Factor, InputMoments, factor
from qrosa.quant.low_rank import best_low_rank
from qrosa.quant.maxima import search_maxima
from qrosa.quant.nf4 import NF4Weight

_ALTERNATIONS = 2


@dataclass(frozen=True)
class Matrix:
    """One matrix in 4 bits, and its repair.

    Attributes:
        weight: The packed base.
        positions: int64 [nnz], flat and rising, or None without a sparse part.
        values: fp32 [nnz], what the sparse part holds there.
        low_rank: B bf16 [N, r] and A bf16 [r, K], scale 1, or None.
        error: Squared output error over the calibration, as a share of the output's square.
        nearest_error: The same of rounding to nearest without a repair.
    """

    weight: NF4Weight
    positions: Tensor | None
    values: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    error: float
    nearest_error: float


@torch.no_grad()
def quantize_matrices(
    linears: Mapping[str, nn.Linear],
    moments: InputMoments,
    positions: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    *,
    damping: float,
    seed: int,
) -> dict[str, Matrix]:
    """Quantise the linear layers of a block.

    Args:
        linears: Path -> layer with its 16-bit weight.
        moments: Second moments of their inputs. A layer that never ran is rounded to nearest.
        positions: Path -> flat positions of the sparse part, rising.
        ranks: Path -> rank of the low-rank part, 0 or missing for none.
        damping: Share of the moments' mean diagonal that is added to it.
        seed: Of the low-rank fit.
    """
    made: dict[str, Matrix] = {}
    for group in moments.groups():
        look()
        sums = moments.sums.pop(group[0])
        factored = factor(sums, damping)
        weights = {path: linears[path].weight.detach().float() for path in group}
        exact = {path: _mask(weights[path], positions.get(path)) for path in group}
        low_rank: dict[str, tuple[Tensor, Tensor]] = {}
        for _ in range(_ALTERNATIONS if any(ranks.get(path) for path in group) else 1):
            parts = _round(weights, exact, low_rank, factored)
            for path in group:
                if ranks.get(path):
                    b, a = best_low_rank(weights[path] - parts[path].effective, sums, ranks[path], seed)
                    low_rank[path] = b.bfloat16(), a.bfloat16()
        for path in group:
            made[path] = _finish(weights[path], parts[path], positions.get(path), low_rank.get(path), sums)
    for path, linear in linears.items():
        if path not in made:
            made[path] = Matrix(NF4Weight.quantize(linear.weight.detach(), torch.bfloat16), None, None, None, 0.0, 0.0)
    return {path: made[path] for path in linears}


@dataclass(frozen=True)
class _Part:
    """One rounded matrix: the base, and what base and sparse part make together, fp32 [N, K]."""

    weight: NF4Weight
    effective: Tensor


def _round(
    weights: Mapping[str, Tensor],
    exact: Mapping[str, Tensor | None],
    low_rank: Mapping[str, tuple[Tensor, Tensor]],
    factored: Factor,
) -> dict[str, _Part]:
    """Round matrices of one input, less their low-rank parts."""
    targets = {path: weight - _product(low_rank.get(path)) for path, weight in weights.items()}
    maxima = {path: search_maxima(target, factored.worth(), exact[path]) for path, target in targets.items()}
    scales = torch.cat([found.expand() for found in maxima.values()])
    held = None
    if any(mask is not None for mask in exact.values()):
        shapes = zip(exact.values(), targets.values(), strict=True)
        held = torch.cat(
            [mask if mask is not None else torch.zeros_like(target, dtype=torch.bool) for mask, target in shapes]
        )
    rounded = round_with_feedback(torch.cat(list(targets.values())), scales, factored, held)
    rows = [len(target) for target in targets.values()]
    parts = {}
    pieces = zip(maxima.items(), rounded.codes.split(rows), rounded.wanted.split(rows), strict=True)
    for (path, found), codes, wanted in pieces:
        weight, mask = found.with_codes(codes), exact[path]
        decoded = weight.dequantize(torch.float32)
        parts[path] = _Part(weight, decoded if mask is None else torch.where(mask, wanted, decoded))
    return parts


def _finish(
    weight: Tensor, part: _Part, positions: Tensor | None, low_rank: tuple[Tensor, Tensor] | None, sums: Tensor
) -> Matrix:
    """The matrix as it is stored, and how far its output is off."""
    values = None
    if positions is not None:
        positions = positions.to(weight.device)
        values = (part.effective - part.weight.dequantize(torch.float32)).view(-1)[positions]
    nearest = NF4Weight.quantize(weight).dequantize(torch.float32)
    whole = _output_square(weight, sums)
    return Matrix(
        part.weight,
        positions,
        values,
        low_rank,
        _output_square(weight - part.effective - _product(low_rank), sums) / whole,
        _output_square(weight - nearest, sums) / whole,
    )


def _mask(weight: Tensor, positions: Tensor | None) -> Tensor | None:
    """bool [N, K] of flat positions."""
    if positions is None or not positions.numel():
        return None
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[positions.to(weight.device)] = True
    return mask.view_as(weight)


def _product(low_rank: tuple[Tensor, Tensor] | None) -> Tensor | float:
    """B @ A in fp32, 0 without a low-rank part."""
    return 0.0 if low_rank is None else low_rank[0].float() @ low_rank[1].float()


def _output_square(weight: Tensor, sums: Tensor) -> float:
    """tr(W H W^T), the squared output over the calibration."""
    return float(((weight @ sums) * weight).sum(dtype=torch.float64))
