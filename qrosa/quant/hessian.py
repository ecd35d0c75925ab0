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
    damped = hessian.double()
    diagonal = damped.diagonal()
    if not bool(diagonal.isfinite().all()) or not bool((diagonal > 0).any()):
        raise InputError(
            "the second moments of a layer's inputs are not finite, or all zero",
            "check the calibration text and the model's weights",
        )
    damped = damped.clone() if damped is hessian else damped
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal += damping * diagonal.mean()
    damped = damped[order][:, order]
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    upper = torch.linalg.solve_triangular(
        lower.flip(0, 1), torch.eye(len(order), dtype=lower.dtype, device=lower.device), upper=True
    )
    return Factor(order, upper.float())


@contextmanager
def input_moments(layers: Mapping[str, nn.Module], moments: dict[str, Tensor]) -> Iterator[None]:
    """While inside, each forward pass adds X^T X of the layers' inputs to ``moments``, fp32 [K, K].

    Args:
        layers: Name -> linear layer; one of those that share an input is enough.
        moments: Filled by name; sums stand where they are on the layer's device.
    """
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            if name not in moments:
                moments[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            moments[name].addmm_(x.mT, x)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
