"""The quantised linear layer with its low-rank and sparse part.

    Y = X @ (deq(Wq) + S)^T + (alpha / r) * drop(X) @ A^T @ B^T + bias

The arithmetic is one op, ``qrosa::linear``, which keeps X once for its backward pass and builds the dense weight in a
scratch that it gives back before it returns. This module only owns the tensors. Both parts are optional and may
come and go: warm-up trains the low-rank part alone, mask selection adds the sparse part later, and with
``adapter_enabled`` off the layer is the bare 4-bit base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qrosa import ops
from qrosa.adapters.compose import add_parts, compose
from qrosa.adapters.forms import LORA, LowRankForm
from qrosa.adapters.low_rank import LowRank
from qrosa.errors import InputError
from qrosa.ops.recompute import is_recomputing, output_unread
from qrosa.quant.nf4 import NF4Weight
from qrosa.sparse.csr import CsrDelta

SPARSE_TENSORS = ("sparse_row_ptr", "sparse_col", "sparse_values")
"""The sparse part's tensors, by attribute and by their names in a file."""


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
        low_rank: The low-rank part or None.
        sparse_values: fp32 [nnz] or None, with buffers ``sparse_row_ptr`` and ``sparse_col``.
        adapter_enabled: False gives the bare base.
        device: Where the layer computes. The packed base may lie elsewhere, when it is streamed.
    """

    bias: nn.Parameter | None
    low_rank: LowRank | None
    sparse_values: nn.Parameter | None
    sparse_row_ptr: Tensor | None
    sparse_col: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.device = weight.device
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.register_module("low_rank", None)
        self.register_parameter("sparse_values", None)
        self.register_buffer("sparse_row_ptr", None)
        self.register_buffer("sparse_col", None)
        self.adapter_enabled = True
        self.output_unread = False  # by what a recomputed block saves (qrosa.model.unread)
        self.node = 0  # of the latest output in autograd's graph, by its id
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
        return 0 if self.low_rank is None else self.low_rank.rank

    @property
    def alpha(self) -> float:
        """Scale numerator of the low-rank part, 0 without one."""
        return 0.0 if self.low_rank is None else self.low_rank.alpha

    @property
    def nnz(self) -> int:
        """Number of sparse values, 0 without a sparse part."""
        return 0 if self.sparse_values is None else self.sparse_values.numel()

    def add_low_rank(
        self,
        rank: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        form: LowRankForm = LORA,
    ) -> None:
        """Give the layer a new low-rank part, which does not change the output yet.

        Args:
            rank: At least 1 and at most min(N, K).
            alpha: Scale numerator.
            dropout: Dropout of the part's input while training.
            generator: Source of the initial values, on the CPU, so that every device starts from the same ones.
            form: What the part is made of.

        Raises:
            InputError: The rank does not fit.
        """

        def weight() -> Tensor:
            return add_parts(self.weight.dequantize(torch.float32), None, self.sparse_delta())

        part = LowRank.new(self.weight.shape, rank, alpha, dropout, weight=weight, generator=generator, form=form)
        self.set_low_rank(part)

    def set_low_rank(self, part: LowRank | None) -> None:
        """Put a low-rank part in place of the one there is, or take it away; it moves to the layer's device."""
        self.low_rank = None if part is None else part.to(self.device)

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
        """The trained parameters that there are, by their names in a file."""
        parameters = {} if self.low_rank is None else self.low_rank.tensors()
        return parameters if self.sparse_values is None else {**parameters, "sparse_values": self.sparse_values}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All that is saved of the layer's adapter, by name: parameters, and where the sparse ones are."""
        low_rank: dict[str, Tensor] = {} if self.low_rank is None else dict(self.low_rank.tensors())
        sparse = {name: getattr(self, name) for name in SPARSE_TENSORS}
        return low_rank | {name: tensor for name, tensor in sparse.items() if tensor is not None}

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
        values, csr = own["sparse_values"], None
        row_ptr, col = buffers["sparse_row_ptr"], buffers["sparse_col"]
        if values is not None and row_ptr is not None and col is not None:
            csr = ops.CsrOperands(row_ptr, col, values)
        part: LowRank | None = self._modules["low_rank"]  # type: ignore[assignment]
        if part is None:
            return self._differentiable(x, nf4, features, bias, csr)
        dropout = part.dropout if self.training else 0.0
        # Drawn from the CPU generator: no device sync, and checkpointing replays it with the RNG state.
        seed = int(torch.randint(2**31, ())) if dropout else 0
        a, b = part.factors()
        if not part.has_gain:
            return self._differentiable(x, nf4, features, bias, csr, a, b, part.scale, dropout, seed)
        y = ops.linear(x, nf4, features, None, csr, a, b, part.scale, dropout, seed)
        y = y * part.gain(self._sum).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    def _differentiable(self, x: Tensor, *operands: Any) -> Tensor:
        if self.output_unread and is_recomputing():
            with output_unread():
                return ops.linear(x, *operands)
        y = ops.linear(x, *operands)
        self.node = id(y.grad_fn)
        return y

    def _sum(self) -> Tensor:
        """W + S + scale * B @ A, fp32 [N, K], before the low-rank form's gain."""
        return add_parts(self.weight.to(self.device).dequantize(torch.float32), self.low_rank, self.sparse_delta())

    def _planned(self) -> _Plan | None:
        part, delta = (self.low_rank, self.sparse_delta()) if self.adapter_enabled else (None, None)
        if part is not None and part.has_gain:
            return None
        a, b = (None, None) if part is None else part.factors()
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        csr, scale = None if delta is None else delta.operands(), 0.0 if part is None else part.scale
        layer = ops.plan_decode(self.weight.operands(), self.weight.shape, bias, csr, a, b, scale)
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
        """W_eff, composed densely in fp32 [N, K] and cast once."""
        weight = self.weight.dequantize(torch.float32)
        if self.adapter_enabled:
            compose(weight, self.low_rank, self.sparse_delta())
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
