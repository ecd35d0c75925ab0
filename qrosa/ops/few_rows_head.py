"""The output head for one token at a time: a plain linear layer, but for the order of its product.

The head is the largest matrix that stays in 16 bits, and generation reads all of it for every token. On a CPU with
matrix tiles PyTorch's ``linear`` lays the weight out anew at each call, which costs several times the reading. Asked
for W x instead of x W^T it takes the weight as it lies, and lays out the few rows of x. Nothing is copied or kept, so
a head that is tied to the embedding stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qrosa.ops import products

_FEW_ROWS = 16
"""Up to so many rows the product is turned around; measured, not critical: at 64 rows both take the same time."""


class OutputHead(nn.Linear):
    """Logits [..., V] of hidden states [..., d]; its parameters are those of the head that it stands in for."""

    @classmethod
    def of(cls, linear: nn.Linear) -> OutputHead:
        """A head that shares the parameters of ``linear``, which may be on ``meta``."""
        bias = linear.bias is not None
        head = cls(linear.in_features, linear.out_features, bias, device="meta", dtype=linear.weight.dtype)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits in x's dtype, summed in fp32."""
        weight, rows = self.weight, x.numel() // max(x.shape[-1], 1)
        differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if products.widens(x) and not differentiable:
            return (
                products.linear(x.reshape(rows, x.shape[-1]), weight, self.bias)
                .to(x.dtype)
                .view(*x.shape[:-1], weight.shape[0])
            )
        few = 0 < rows <= _FEW_ROWS and x.is_cpu and x.dtype == weight.dtype == torch.bfloat16
        if not few or differentiable:
            return nn.functional.linear(x, weight, self.bias)
        columns = x.reshape(rows, -1).t()
        turned = weight @ columns if rows > 1 else torch.mv(weight, columns[:, 0])[:, None]  # [V, rows]
        logits = turned.t().contiguous().view(*x.shape[:-1], -1)
        return logits if self.bias is None else logits.add_(self.bias)
