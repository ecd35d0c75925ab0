"""Flat fp32 masters as a module that an engine for models can train, with gradients that are known already.

An engine such as DeepSpeed's takes gradients where autograd leaves them: in hooks on parameters, while a loss goes
backward. So the masters are parameters of a module whose output is a zero, made of functions whose backward pass gives
the gradient that was handed to the forward pass. No arithmetic is done on the way, so no bit changes.

Pieces are at most a bucket long, so what the engine copies, reduces and gathers at once is a bucket and not the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _HandOver(torch.autograd.Function):
    """Gives a parameter, in backward, a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor, scale: float) -> Tensor:
        ctx.gradient, ctx.scale = gradient, scale
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.gradient if ctx.scale == 1.0 else ctx.gradient * ctx.scale
        return gradient, None, None


class MasterPiece(nn.Module):
    """Up to a bucket of consecutive masters, fp32 [numel], as one parameter."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, gradient: Tensor, scale: float) -> Tensor:
        """A zero whose gradient with respect to the masters is ``scale * gradient``."""
        result: Tensor = _HandOver.apply(self.values, gradient, scale)  # type: ignore[no-untyped-call]
        return result


class Masters(nn.Module):
    """The pieces of all parts, in order.

    Args:
        flats: Part -> flat masters.
        piece: Elements of a piece.
        multiple: What the size of a last, smaller piece is filled up to.
    """

    def __init__(self, flats: Mapping[str, Tensor], piece: int, multiple: int) -> None:
        super().__init__()
        self.piece, self.multiple = piece, multiple
        for name, flat in flats.items():
            values = (padded(part.detach(), multiple).clone() for part in flat.split(piece))
            self.add_module(name, nn.ModuleList(MasterPiece(part) for part in values))

    def of(self, name: str) -> list[nn.Parameter]:
        """The parameters of a part."""
        return list(self.get_submodule(name).parameters())

    def forward(self, gradients: Mapping[str, Tensor], scale: float) -> Tensor:
        """A zero whose gradients are ``scale`` times the given ones."""
        terms = [
            piece(padded(gradient, self.multiple), scale)
            for name, pieces in self.named_children()
            for piece, gradient in zip(pieces.children(), gradients[name].split(self.piece), strict=True)
        ]
        return torch.stack(terms).sum()


def padded(values: Tensor, multiple: int) -> Tensor:
    """``values`` with zeros at the end, up to a multiple."""
    missing = -values.numel() % multiple
    return nn.functional.pad(values, (0, missing)) if missing else values
