"""Collecting the statistic of a mask: what dY^T @ X was, or its square, sample by sample.

The gradient of a weight [N, K] that is frozen and packed exists nowhere, so it is formed on the side. A forward hook
sends the layer's output through ``Observe``, which is the identity, keeps X (the tensor that the layer itself is
given, so no memory is added) and in backward adds this sample's dY^T @ X to the statistic. The design not taken,
hooks on full backward, sees dY but has to hold X by itself, and breaks under checkpointing, where the hook would keep
the tensors that checkpointing is there to drop; saved through autograd, X is recomputed with everything else.

Gradients must reach the layers even though nothing in the model is trained. Each ``Observe`` also takes an *anchor*,
a scalar that requires grad: that alone puts the layer's output into the graph. The graph therefore begins at the
first observed layer, and backward stops there: what lies below a group of layers runs forward only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qrosa import ops


class Observe(torch.autograd.Function):
    """The identity on ``y`` that adds (dY^T @ X) or its square to a statistic when backward passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, statistic: Tensor, square: bool) -> Tensor:
        """Pass ``y`` [..., N] on.

        Args:
            ctx: Autograd's context.
            y: The layer's output [..., N].
            x: The layer's input [..., K].
            anchor: A scalar that requires grad.
            statistic: fp32 [N, K], added to in backward.
            square: Square this sample's gradient before it is added.
        """
        ctx.save_for_backward(x)
        ctx.statistic, ctx.square = statistic, square
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Add to the statistic; the gradient of ``y`` passes unchanged."""
        (dy,) = grads
        (x,) = ctx.saved_tensors
        if dy is not None:
            rows, columns = ctx.statistic.shape
            flat_dy, flat_x = dy.reshape(-1, rows), x.reshape(-1, columns)
            ops.score_accumulate(flat_dy.contiguous(), flat_x.contiguous(), ctx.statistic, ctx.square)
        return (dy if ctx.needs_input_grad[0] else None), None, None, None, None


@contextmanager
def observe(modules: Mapping[str, nn.Module], statistics: Mapping[str, Tensor], square: bool) -> Iterator[Tensor]:
    """While inside, every backward pass adds to the statistics of the given linear layers.

    The gradient that is squared is that of one call of the layer: with one sample a forward pass, of one sample.

    Args:
        modules: Path -> linear layer [..., K] -> [..., N].
        statistics: Path -> fp32 [N, K], on the layer's device.
        square: Add squared gradients, or plain ones.

    Yields:
        The anchor: ``torch.autograd.grad(loss, anchor, allow_unused=True)`` runs exactly the part of backward that
        the statistics need and leaves no ``.grad`` anywhere.
    """
    anchor = torch.zeros((), requires_grad=True)
    handles = []
    for path, module in modules.items():

        def hook(
            _: nn.Module,
            inputs: tuple[Tensor, ...],
            y: Tensor,
            statistic: Tensor = statistics[path],
        ) -> Tensor:
            return Observe.apply(y, inputs[0], anchor, statistic, square)  # type: ignore[no-any-return,no-untyped-call]

        handles.append(module.register_forward_hook(hook))
    try:
        yield anchor
    finally:
        for handle in handles:
            handle.remove()
