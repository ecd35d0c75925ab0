"""The quantised linear layer with its low-rank and sparse part.

    Y = X @ (deq(Wq) + S)^T + (alpha / r) * drop(X) @ A^T @ B^T + bias

The arithmetic is one op, ``qrosa::linear``, which keeps X once for its backward pass and builds the dense weight in a
scratch that it gives back before it returns. This module only owns the tensors. Both parts are optional and may
come and go: warm-up trains the low-rank part alone, mask selection adds the sparse part later, and with
``adapter_enabled`` off the layer is the bare 4-bit base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qrosa import ops
from qrosa.errors import InputError
from qrosa.quant.nf4 import NF4Weight
from qrosa.sparse.csr import CsrDelta


class _Plan(NamedTuple):
    weight: NF4Weight
    """What the plan was made of; a streamed base puts another one in its place, which no plan fits."""
    layer: ops.DecodePlan
    dtype: torch.dtype
    """Of x; the bias was converted to it."""
    elements: int
    """Most of x."""


class QRosaLinear(nn.Module):
    """A frozen NF4 weight [N out, K in] with optional low-rank and sparse parts.

    Attributes:
        weight: The packed base. A plain record: ``model.to(device)`` moves it, no dtype cast reaches it.
        bias: [N] or None, frozen.
        low_rank_A: bf16 [r, K] or None.
        low_rank_B: bf16 [N, r] or None.
        sparse_values: fp32 [nnz] or None, with buffers ``sparse_row_ptr`` and ``sparse_col``.
        alpha: Scale numerator; the low-rank product is multiplied by ``alpha / rank``.
        dropout: Share of inputs of the low-rank part zeroed while training.
        adapter_enabled: False gives the bare base.
        device: Where the layer computes. The packed base may lie elsewhere, when it is streamed.
    """

    bias: nn.Parameter | None
    low_rank_A: nn.Parameter | None
    low_rank_B: nn.Parameter | None
    sparse_values: nn.Parameter | None
    sparse_row_ptr: Tensor | None
    sparse_col: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.device = weight.device
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.register_parameter("low_rank_A", None)
        self.register_parameter("low_rank_B", None)
        self.register_parameter("sparse_values", None)
        self.register_buffer("sparse_row_ptr", None)
        self.register_buffer("sparse_col", None)
        self.alpha = 0.0
        self.dropout = 0.0
        self.adapter_enabled = True
        self._plan: _Plan | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 0,
        alpha: float = 16.0,
        dropout: float = 0.0,
        mask: Tensor | CsrDelta | None = None,
    ) -> QRosaLinear:
        """Quantise a dense layer and give it adapters.

        Args:
            linear: The layer to replace; its weight is quantised, its bias kept.
            rank: Rank of the low-rank part, 0 for none.
            alpha: Scale numerator of the low-rank part.
            dropout: Dropout of the low-rank part.
            mask: bool [N, K], a ``CsrDelta``, or None for no sparse part.
        """
        layer = cls(NF4Weight.quantize(linear.weight.detach()), linear.bias)
        if rank:
            layer.add_low_rank(rank, alpha, dropout)
        if mask is not None:
            layer.set_sparse(mask if isinstance(mask, CsrDelta) else CsrDelta.from_mask(mask))
        return layer

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the low-rank part, 0 without one."""
        return 0 if self.low_rank_A is None else self.low_rank_A.shape[0]

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def nnz(self) -> int:
        """Number of sparse values, 0 without a sparse part."""
        return 0 if self.sparse_values is None else self.sparse_values.numel()

    def add_low_rank(
        self, rank: int, alpha: float = 16.0, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """Give the layer a new low-rank part: A uniform as in LoRA, B zero, so that the output does not change.

        Args:
            rank: At least 1 and at most min(N, K).
            alpha: Scale numerator.
            dropout: Dropout of the part's input while training.
            generator: Source of A's values, on the CPU, so that every device starts from the same ones.
        """
        if not 1 <= rank <= min(self.weight.shape):
            raise InputError(
                f"rank {rank} does not fit a {self.out_features} x {self.in_features} matrix",
                f"use a rank from 1 to {min(self.weight.shape)}",
            )
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform(a=sqrt(5)), what LoRA implementations use for A
        a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.low_rank_A = nn.Parameter(a.to(device=self.device, dtype=torch.bfloat16))
        self.low_rank_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.bfloat16, device=self.device))
        self.alpha, self.dropout = float(alpha), float(dropout)

    def set_sparse(self, delta: CsrDelta | None) -> None:
        """Put a sparse part in place of the one there is, or take it away."""
        if delta is None:
            self.sparse_values = self.sparse_row_ptr = self.sparse_col = None
            return
        if tuple(delta.shape) != tuple(self.weight.shape):
            raise InputError(
                f"a {delta.shape[0]} x {delta.shape[1]} mask for a {self.out_features} x {self.in_features} matrix",
                "make the mask for this layer",
            )
        self.sparse_row_ptr = delta.row_ptr.to(self.device)
        self.sparse_col = delta.col.to(self.device)
        self.sparse_values = nn.Parameter(delta.values.detach().to(device=self.device, dtype=torch.float32))

    def sparse_delta(self) -> CsrDelta | None:
        """The sparse part, sharing this layer's tensors."""
        if self.sparse_values is None or self.sparse_row_ptr is None or self.sparse_col is None:
            return None
        return CsrDelta(self.sparse_row_ptr, self.sparse_col, self.sparse_values, self.weight.shape)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters that there are, by attribute name."""
        names = ("low_rank_A", "low_rank_B", "sparse_values")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Map X [..., K] to Y [..., N] in X's dtype."""
        plan = self._plan
        if plan is not None and plan.weight is self.weight and x.numel() <= plan.elements and x.dtype is plan.dtype:
            return ops.decode_planned(x.contiguous(), plan.layer.packed)  # type: ignore[no-any-return]
        # The dictionaries: a Module's attributes cost more than all else here that is not arithmetic.
        own, buffers, weight = self._parameters, self._buffers, self.weight
        nf4, bias, features = weight.operands(), own["bias"], weight.shape[0]
        if not self.adapter_enabled:
            return ops.linear(x, nf4, features, bias)
        a, b, values, csr = own["low_rank_A"], own["low_rank_B"], own["sparse_values"], None
        row_ptr, col = buffers["sparse_row_ptr"], buffers["sparse_col"]
        if values is not None and row_ptr is not None and col is not None:
            csr = ops.CsrOperands(row_ptr, col, values)
        if a is None:
            return ops.linear(x, nf4, features, bias, csr)
        dropout = self.dropout if self.training else 0.0
        # Drawn from the CPU generator: no device sync, and checkpointing replays it with the RNG state.
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return ops.linear(x, nf4, features, bias, csr, a, b, self.alpha / a.shape[0], dropout, seed)

    def _planned(self) -> _Plan | None:
        csr, a, b, dtype = None, None, None, self.weight.dtype
        if self.adapter_enabled:
            delta, a, b = self.sparse_delta(), self.low_rank_A, self.low_rank_B
            csr = None if delta is None else ops.CsrOperands(delta.row_ptr, delta.col, delta.values)
        bias = None if self.bias is None else self.bias.to(dtype)
        layer = ops.plan_decode(self.weight.operands(), self.weight.shape, bias, csr, a, b, self.scale)
        if layer is None:
            return None
        return _Plan(self.weight, layer, dtype, ops.decode_rows(self.device) * self.in_features)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside the block the layer is called without gradients, and nothing of it changes: calls cost less."""
        self._plan = self._planned() if self.weight.device == self.device else None
        try:
            yield
        finally:
            self._plan = None

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff = deq(Wq) + S + scale * B @ A, composed densely in fp32 [N, K] and cast once."""
        weight = self.weight.dequantize(torch.float32)
        delta = self.sparse_delta()
        if self.adapter_enabled and delta is not None:
            weight.view(-1)[delta.positions()] += delta.values.detach()
        if self.adapter_enabled and self.low_rank_A is not None and self.low_rank_B is not None:
            weight += self.scale * (self.low_rank_B.float() @ self.low_rank_A.float())
        return weight.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QRosaLinear:
        """Follow moves between devices; ignore dtype casts, which would change the base or lose updates."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if device != self.device:
            self.weight, self.device = self.weight.to(device), device
        return self

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank}, nnz={self.nnz}"
        return f"{sizes}, bias={self.bias is not None}"
