"""Seeing each matrix's gradient: dY and X of every call of a layer, handed on in backward, sample by sample.

The gradient of a weight [N, K] that is frozen and packed exists nowhere, so it is formed on the side. A forward hook
sends the layer's output through ``Observe``, which is the identity, keeps X (the tensor that the layer itself is
given, so no memory is added) and in backward hands dY and X on, for whoever wants something of dY^T @ X. The design not
taken, hooks on full backward, sees dY but has to hold X by itself, and breaks under checkpointing, where the hook would
keep the tensors that checkpointing is there to drop; saved through autograd, X is recomputed with everything else.

Gradients must reach the layers even though nothing in the model is trained. Each ``Observe`` also takes an *anchor*,
a scalar that requires grad: that alone puts the layer's output into the graph. The graph therefore begins at the
first observed layer, and backward stops there: what lies below a group of layers runs forward only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.errors import TrainingError
from qrosa.masks.selection_rows import Sample, SampleLoss, quiet, sample_loss

Advance = Callable[[int, int], None]
"""Called with (what is done, what there is to do)."""

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
def observe(modules: Mapping[str, nn.Module], receivers: Mapping[str, Receiver]) -> Iterator[Tensor]:
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


def run_backward(
    model: nn.Module,
    rows: list[Sample],
    anchor: Tensor,
    loss: SampleLoss = sample_loss,
    done: Callable[[int], None] | None = None,
) -> None:
    """One forward and backward pass a sample, without dropout, for whoever observes layers under ``anchor``.

    Args:
        model: The whole model.
        rows: Samples with at least one supervised token.
        anchor: What ``observe`` yielded.
        loss: Mean loss of one sample.
        done: Called with the number of samples done after each.

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
