"""Gradients of ``qrosa::linear``, registered on the op: what is saved, and what is asked of the backward op.

The backward is itself an op (``qrosa::linear_backward``), so tracing sees two opaque nodes and no scratch.

The autograd kernel is registered by hand: what ``torch.library.register_autograd`` makes reads the whole schema again
in every call, some 0.1 ms, which is a tenth of a small layer.
"""

from __future__ import annotations

from typing import Any

import torch

from qrosa.ops.schema import LIBRARY

_X, _BIAS, _VALUES, _A, _B = 0, 8, 11, 12, 13
"""Places of the differentiable inputs in the schema of ``qrosa::linear``."""
_INPUTS = 17


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, _out_features, bias = inputs[:9]
    row_ptr, col, values, a, b, scale, dropout_p, seed = inputs[9:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, output[1], codes, absmax, absmax_code, absmax_scale, absmax_offset, row_ptr, col, values, a, b
    )
    ctx.settings = (block_size, scale, dropout_p, seed)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: torch.Tensor | None, _dprojected: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gradients: list[torch.Tensor | None] = [None] * _INPUTS
    needs = [ctx.needs_input_grad[place] for place in (_X, _VALUES, _A, _B, _BIAS)]
    if dy is None or not any(needs):
        return tuple(gradients)
    x, projected, *nf4_tensors, row_ptr, col, values, a, b = ctx.saved_tensors
    block_size, scale, dropout_p, seed = ctx.settings
    results = torch.ops.qrosa.linear_backward(
        dy, x, projected, *nf4_tensors, block_size, row_ptr, col, values, a, b, scale, dropout_p, seed, needs
    )
    for place, need, gradient in zip((_X, _VALUES, _A, _B, _BIAS), needs, results, strict=True):
        if need:
            gradients[place] = gradient.to(ctx.bias_dtype) if place == _BIAS else gradient
    return tuple(gradients)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _below_autograd(*inputs)
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
