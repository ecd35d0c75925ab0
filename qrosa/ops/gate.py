"""The gate of a feed-forward block, act(gate) up, as one op each way, and the blocks that use it.

Written out in PyTorch, the activation is a tensor [T, f] of its own that the product saves; here gate and up are all
that is saved, and backward computes the activation again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.ops import reference
from qrosa.ops.schema import LIBRARY


def gate(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) up, differentiable in both.

    Args:
        gate: [..., f] bf16, fp16 or fp32 (fp64: through the reference); may be a part of wider rows.
        up: The same shape and dtype.
        gelu: The activation is GELU by its tanh formula; else SiLU.

    Returns:
        [..., f], dense, the activation rounded before the product.
    """
    width = gate.shape[-1]
    rows, others = gate.reshape(-1, width), up.reshape(-1, width)
    if gate.dtype == torch.float64:
        return reference.gate(rows, others, gelu).view(gate.shape)
    return torch.ops.qrosa.gate(rows, others, gelu).view(gate.shape)  # type: ignore[no-any-return]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _below_autograd(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *torch.ops.qrosa.gate_backward(dy.contiguous(), *ctx.saved_tensors, ctx.gelu), None


def _below_autograd(*inputs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        output: Tensor = torch.ops.qrosa.gate.default(*inputs)
    return output


def _gate(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    wanted = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    return _Gate.apply(gate, up, gelu) if wanted else _below_autograd(gate, up, gelu)  # type: ignore[no-untyped-call]


LIBRARY.impl("gate", _gate, "Autograd")


class GatedBlock(nn.Module):
    """A feed-forward block of three matrices; its layers keep the names that they have in the block it stands in for.

    Args:
        layers: ``gate_proj``, ``up_proj`` and ``down_proj``, in the order of that block.
        gelu: The activation is GELU by its tanh formula; else SiLU.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, layers: Mapping[str, nn.Module], gelu: bool) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [..., d] of x [..., d]."""
        return self.down_proj(gate(self.gate_proj(x), self.up_proj(x), self.gelu))  # type: ignore[no-any-return]


class JoinedGatedBlock(nn.Module):
    """The same where gate and up are one matrix, gate first: ``gate_up_proj`` and ``down_proj``."""

    gate_up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, layers: Mapping[str, nn.Module], gelu: bool) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [..., d] of x [..., d]."""
        return self.down_proj(self._product(x))  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Tensor:
        # Of its own, so that gate and up are free before the down projection runs.
        first, second = self.gate_up_proj(x).chunk(2, -1)
        return gate(first, second, self.gelu)
