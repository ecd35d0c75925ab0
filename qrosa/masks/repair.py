"""Repair: the adapter starts at the base's quantisation error instead of at zero.

S starts at R = W - deq(Wq) on its positions, which makes the effective weight the original one there. The low-rank
part can start at the best fit of what is left of R. "Best" is meant for the layer's output, not for the weight: with
inputs of second moment E[x_j^2] per channel j, and channels taken as uncorrelated, the mean squared output error of
an approximation L of R is || (R - L) D ||_F^2 with D = diag(sqrt(E[x_j^2])), so that

    R D = U Sigma V^T,      scale * B = U_r Sigma_r^(1/2),      A = Sigma_r^(1/2) V_r^T D^-1

(QERA-approx, arXiv 2410.06040, theorem 4.1; LQER, arXiv 2402.02446, scales alike by mean magnitudes; LoftQ, arXiv
2310.08659, is D = 1.) ``scale`` is split over both factors to keep their magnitudes level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.base_files import BaseFiles
from qrosa.heap import look
from qrosa.masks.observe import Advance
from qrosa.masks.residual import checkpoint_of, has_original, residual
from qrosa.masks.selection_rows import Sample, quiet, read_samples
from qrosa.sparse.csr import CsrDelta

_FULL_SVD = 256  # smaller side up to which the exact decomposition is cheap
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6  # a quantisation error has a flat spectrum, which needs more than the usual two
_NOTICE = "{source} is already quantised, so its quantisation error is unknown: {part} starts at {start}"


def set_masks(
    model: nn.Module,
    positions: Mapping[str, Tensor],
    *,
    init: str = "residual",
    low_rank_repairs: bool = False,
    base_files: BaseFiles | None = None,
    progress: Advance | None = None,
) -> list[str]:
    """Give each layer its sparse part, with its first values.

    Args:
        model: A loaded base; the low-rank part may have been trained already.
        positions: Path -> flat positions, int64, rising. Layers without any are left without a sparse part.
        init: ``residual`` (S starts at R) or ``zero``.
        low_rank_repairs: The low-rank part itself started at R (``init_low_rank``). S then starts at what it leaves,
            R - scale * B @ A, so that the effective weight is the original one at the positions.
        base_files: The 16-bit weights; default the base's own source.
        progress: Called with (layers done, layers in all).

    Returns:
        Notices to print: empty, or why S starts at zero although its residual was asked for.
    """
    layers = quantized_linears(model)
    notices = []
    if init == "residual" and base_files is None:
        if has_original(model):
            base_files = checkpoint_of(model)
        else:
            notices = [_NOTICE.format(source=_source(model), part="the sparse part", start="zero")]
    for done, (path, layer) in enumerate(layers.items(), 1):
        look()
        chosen = positions.get(path)
        if chosen is None or not chosen.numel():
            layer.set_sparse(None)
        else:
            values = None
            if init == "residual" and base_files is not None:
                values = _start_values(base_files, path, layer, chosen, low_rank_repairs)
            layer.set_sparse(CsrDelta.from_positions(chosen, layer.weight.shape, values))
        if progress:
            progress(done, len(layers))
    return notices


def init_low_rank(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    limit: int | None = 64,
    seed: int = 42,
    base_files: BaseFiles | None = None,
    progress: Advance | None = None,
) -> list[str]:
    """Start every low-rank part at the activation-weighted fit of R - S, where S is what the layer holds now.

    Args:
        model: A loaded base with low-rank parts; their values are replaced.
        samples: Rows whose activations weigh the input channels.
        limit: Most rows to use.
        seed: Of the randomised decomposition.
        base_files: The 16-bit weights; default the base's own source.
        progress: Called with (layers done, layers in all).

    Returns:
        Notices to print: empty, or why the low-rank part keeps its start at no change.
    """
    if base_files is None:
        if not has_original(model):
            return [
                _NOTICE.format(
                    source=_source(model),
                    part="the low-rank part",
                    start="no change (lora)",
                )
            ]
        base_files = checkpoint_of(model)
    layers = {path: layer for path, layer in quantized_linears(model).items() if layer.rank}
    weights = input_rms(model, layers, read_samples(samples, limit))
    for done, (path, layer) in enumerate(layers.items(), 1):
        look()
        error = residual(base_files, path, layer.weight.to(layer.device))
        delta = layer.sparse_delta()
        if delta is not None:
            error.view(-1)[delta.positions()] -= delta.values.detach()
        b, a = weighted_factors(error, weights[path], layer.rank, seed)
        assert layer.low_rank is not None
        layer.low_rank.start_at(a, b)
        if progress:
            progress(done, len(layers))
    return []


@torch.no_grad()
def weighted_factors(error: Tensor, rms: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The rank-r product B @ A nearest to ``error`` in the norm || (error - B @ A) diag(rms) ||_F.

    Args:
        error: fp32 [N, K].
        rms: fp32 [K], root mean square of each input channel.
        rank: At most min(N, K).
        seed: Of the randomised decomposition, which large matrices get.

    Returns:
        B fp32 [N, r] and A fp32 [r, K], of equal magnitude.
    """
    # A channel that hardly fires would get an A that explodes when it does.
    weight = rms.clamp_min(float(rms.mean()) * 1e-3).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = error * weight
    if min(error.shape) <= _FULL_SVD or 4 * rank > min(error.shape):
        u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
        u, sigma, v = u[:, :rank], sigma[:rank], vh[:rank].mT
    else:
        with torch.random.fork_rng(devices=[error.device] if error.is_cuda else []):
            torch.manual_seed(seed)
            u, sigma, v = torch.svd_lowrank(scaled, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        u, sigma, v = u[:, :rank], sigma[:rank], v[:, :rank]
    half = sigma.sqrt()
    return u * half, (v * half).mT / weight


def input_rms(model: nn.Module, layers: Mapping[str, nn.Module], samples: list[Sample]) -> dict[str, Tensor]:
    """Root mean square of every layer's input channels over all tokens of the samples: path -> fp32 [K]."""
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    with torch.no_grad(), quiet(model), _input_sums(layers, sums):
        for sample in samples:
            model(
                input_ids=torch.tensor([sample.input_ids], device=device),
                use_cache=False,
                logits_to_keep=1,
            )
    tokens = sum(len(sample.input_ids) for sample in samples)
    return {path: (total / tokens).sqrt().float() for path, total in sums.items()}


@contextmanager
def _input_sums(layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """While inside, each forward pass adds the squares of the layers' inputs to ``sums``, fp64 [K]."""
    handles = []
    for path, layer in layers.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0).double()
            sums[path] = sums[path] + squares if path in sums else squares

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _start_values(
    base_files: BaseFiles,
    path: str,
    layer: QRosaLinear,
    positions: Tensor,
    low_rank_repairs: bool,
) -> Tensor:
    """R at the positions, fp32 [nnz], less what the low-rank part does there if it started at R too."""
    positions = positions.to(layer.device)
    values = residual(base_files, path, layer.weight.to(layer.device)).view(-1)[positions]
    if low_rank_repairs and layer.low_rank is not None:
        values -= layer.low_rank.at(positions)
    return values


def _source(model: nn.Module) -> str:
    return str(getattr(model, "qrosa_base").source)  # noqa: B009  nn.Module does not type added attributes
