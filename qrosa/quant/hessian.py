"""Second moments of a layer's inputs, and their factor that error feedback rounds with.

For Y = X W^T the squared output error of a rounded weight is tr((W - Q) H (W - Q)^T) with H = X^T X over the
calibration's tokens: the Hessian, the same for every output row and for every matrix that reads the same input (q, k
and v; gate and up). Error feedback needs the upper triangular U with H^-1 = U^T U. It is had without an inverse of H:
with J the reversal of rows and columns, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, so U = R^-1.

*Damping* adds a share of the mean diagonal to the diagonal. It keeps directions that the calibration hardly shows
from being treated as free, and is what carries over to text that no calibration saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qrosa.errors import InputError

DAMPING = 0.03


@dataclass(frozen=True)
class Factor:
    """H = X^T X of one input, factored for rounding in one order.

    Attributes:
        order: int64 [K], columns by falling diagonal of H: what matters most is rounded first, with most columns left
            to take its error over (act-order).
        upper: fp32 [K, K], U of H^-1 = U^T U with rows and columns in ``order``.
    """

    order: Tensor
    upper: Tensor

    def worth(self) -> Tensor:
        """1 / U_jj^2 of each column, in its own place, fp32 [K]: a squared error's cost after later columns helped."""
        worth = torch.empty_like(self.upper.diagonal())
        worth[self.order] = self.upper.diagonal().square().reciprocal()
        return worth


@torch.no_grad()
def factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Damp and factor H [K, K] in fp64; channels that never fired count as independent with unit moment.

    Raises:
        InputError: H holds values that are not finite, or is all zero.
    """
    diagonal = hessian.diagonal().double()
    if not bool(diagonal.isfinite().all()) or not bool((diagonal > 0).any()):
        raise InputError(
            "the second moments of a layer's inputs are not finite, or all zero",
            "check the calibration text and the model's weights",
        )
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True)
    backward = order.flip(0)
    damped = hessian[backward][:, backward].double()
    damped.diagonal().copy_(diagonal[backward] + damping * diagonal.mean())
    lower = torch.linalg.cholesky(damped)
    del damped  # three fp64 matrices at once are enough
    identity = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)  # J U J
    del lower, identity
    return Factor(order, inverse.float().flip(0, 1))


class InputMoments:
    """X^T X of the inputs of linear layers, summed over forward passes; layers that share an input share a sum.

    Which layers do shows in the first pass: they are handed the very same tensor.

    Args:
        layers: Path -> layer.
        weights: Path -> what a token counts, fp32 [B, L] in the order in which rows pass; layers that are missing count
            all tokens alike.

    Attributes:
        leader: Layer -> the first layer that reads the same input. Layers that never ran are missing.
        sums: Leader -> fp32 [K, K], on the layer's device.
    """

    def __init__(self, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None = None) -> None:
        self.layers = layers
        self.weights: Mapping[str, Tensor] = weights or {}
        self.leader: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}

    def groups(self) -> list[list[str]]:
        """The layers by shared input, in the order given."""
        groups: dict[str, list[str]] = {}
        for name in self.layers:
            if name in self.leader:
                groups.setdefault(self.leader[name], []).append(name)
        return list(groups.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While inside, each forward pass adds to the sums."""
        seen: dict[str, int] = {}
        first_inputs: dict[str, Tensor] = {}  # kept alive, so that no later tensor can take a first one's place

        def hook(name: str, x: Tensor) -> None:
            if name not in self.leader:
                same = (other for other, first in first_inputs.items() if first is x)
                self.leader[name] = next(same, name)
                first_inputs.setdefault(self.leader[name], x)
            if self.leader[name] == name:
                rows = x.detach().flatten(0, -2).float()
                if name in self.weights:
                    start = seen.get(name, 0)
                    seen[name] = start + len(x)
                    weights = self.weights[name][start : seen[name]].to(rows.device)
                    rows = rows * weights.sqrt().view(-1, 1)
                if name not in self.sums:
                    self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.sums[name].addmm_(rows.mT, rows)

        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs[0]))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
