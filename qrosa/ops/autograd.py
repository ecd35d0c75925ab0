"""Gradients of ``qrosa::linear``, registered on the op: what is saved, and what is asked of the backward op.

The backward is itself an op (``qrosa::linear_backward``), so tracing sees two opaque nodes and no scratch.

The autograd kernel is registered by hand: what ``torch.library.register_autograd`` makes reads the whole schema again
in every call, some 0.1 ms, which is a tenth of a small layer.
"""

from __future__ import annotations

from typing import Any

import torch

from qrosa.ops import linear
from qrosa.ops.operands import NO_DELTA
from qrosa.ops.recompute import is_output_unread
from qrosa.ops.schema import LIBRARY, LINEAR

_DIFFERENTIABLE = tuple(LINEAR.place(name) for name in ("x", "values", "a", "b", "bias"))
_BIAS = LINEAR.place("bias")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, nf4, _out_features, bias, csr, a, b, *settings = LINEAR.split(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *nf4[:5], *(csr or NO_DELTA), a, b)
    ctx.block_size, ctx.settings = nf4.block_size, settings
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: torch.Tensor | None, _dprojected: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gradients: list[torch.Tensor | None] = [None] * len(LINEAR.names)
    needs = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
    if dy is None or not any(needs):
        return tuple(gradients)
    x, projected, *nf4_tensors, row_ptr, col, values, a, b = ctx.saved_tensors
    results = torch.ops.qrosa.linear_backward(
        dy, x, projected, *nf4_tensors, ctx.block_size, row_ptr, col, values, a, b, *ctx.settings, *needs
    )
    for place, need, gradient in zip(_DIFFERENTIABLE, needs, results, strict=True):
        if need:
            gradients[place] = gradient.to(ctx.bias_dtype) if place == _BIAS else gradient
    return tuple(gradients)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = linear.unread(*LINEAR.split(inputs)) if is_output_unread() else _below_autograd(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, *gradients)


def _below_autograd(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[torch.Tensor, torch.Tensor] = torch.ops.qrosa.linear.default(*inputs)
    return output


def _linear(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
    return _Linear.apply(*inputs) if wanted else _below_autograd(*inputs)  # type: ignore[no-untyped-call]


LIBRARY.impl("linear", _linear, "Autograd")
