"""Seeing each matrix's gradient: what dY^T @ X was, or its square, sample by sample, for the statistic of a mask.

The gradient of a weight [N, K] that is frozen and packed exists nowhere, so it is formed on the side. A forward hook
sends the layer's output through ``Observe``, which is the identity, keeps X (the tensor that the layer itself is
given, so no memory is added) and in backward hands dY and X on, to add dY^T @ X to the statistic. The design not taken,
hooks on full backward, sees dY but has to hold X by itself, and breaks under checkpointing, where the hook would keep
the tensors that checkpointing is there to drop; saved through autograd, X is recomputed with everything else.

Gradients must reach the layers even though nothing in the model is trained. Each ``Observe`` also takes an *anchor*,
a scalar that requires grad: that alone puts the layer's output into the graph. The graph therefore begins at the
first observed layer, and backward stops there: what lies below a group of layers runs forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrosa import ops

Receiver = Callable[[Tensor, Tensor], None]
"""Takes dY [T, N] and X [T, K] of one call of a layer."""


class Observe(torch.autograd.Function):
    """The identity on ``y`` that hands dY and X on when backward passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, receive: Receiver) -> Tensor:
        """Pass ``y`` [..., N] on.

        Args:
            ctx: Autograd's context.
            y: The layer's output [..., N].
            x: The layer's input [..., K].
            anchor: A scalar that requires grad.
            receive: Called in backward.
        """
        ctx.save_for_backward(x)
        ctx.receive = receive
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Hand on; the gradient of ``y`` passes unchanged."""
        (dy,) = grads
        (x,) = ctx.saved_tensors
        if dy is not None:
            ctx.receive(dy.reshape(-1, dy.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous())
        return (dy if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def observe(modules: Mapping[str, nn.Module], statistics: Mapping[str, Tensor], square: bool) -> Iterator[Tensor]:
    """While inside, every backward pass adds to the statistics of the given linear layers.

    The gradient that is squared is that of one call of the layer: with one sample a forward pass, of one sample.

    Args:
        modules: Path -> linear layer [..., K] -> [..., N].
        statistics: Path -> fp32 [N, K], on the layer's device.
        square: Add squared gradients, or plain ones.

    Yields:
        The anchor, see ``observe_with``.
    """

    def adding(statistic: Tensor) -> Receiver:
        return lambda dy, x: ops.score_accumulate(dy, x, statistic, square)

    with observe_with(modules, {path: adding(statistics[path]) for path in modules}) as anchor:
        yield anchor


@contextmanager
def observe_with(modules: Mapping[str, nn.Module], receivers: Mapping[str, Receiver]) -> Iterator[Tensor]:
    """While inside, every backward pass hands each given layer's dY and X to its receiver.

    Yields:
        The anchor: ``torch.autograd.grad(loss, anchor, allow_unused=True)`` runs exactly the part of backward that
        the layers need and leaves no ``.grad`` anywhere.
    """
    anchor = torch.zeros((), requires_grad=True)

    def hook(receive: Receiver, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return Observe.apply(y, inputs[0], anchor, receive)  # type: ignore[no-any-return,no-untyped-call]

    handles = [module.register_forward_hook(partial(hook, receivers[path])) for path, module in modules.items()]
    try:
        yield anchor
    finally:
        for handle in handles:
            handle.remove()
