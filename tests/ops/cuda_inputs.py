"""What the CUDA op tests share: the mark that skips them without a card, and inputs on it."""

from __future__ import annotations

import pytest
import torch
from op_inputs import delta, quantized

from qrosa.ops import CsrOperands, NF4Operands

DEVICE = torch.device("cuda")

needs_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


def moved(operands: NF4Operands | CsrOperands, device: torch.device = DEVICE) -> NF4Operands | CsrOperands:
    """The same operands with their tensors on ``device``."""
    return type(operands)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in operands))


def base(rows: int, columns: int, nested: bool = True, seed: int = 0) -> tuple[NF4Operands, NF4Operands]:
    """A quantised matrix on the CPU, for the reference, and on the card."""
    nf4, _, _ = quantized(rows, columns, nested, seed)
    return nf4, moved(nf4)


def sparse(
    rows: int, columns: int, density: float | None, seed: int = 0
) -> tuple[CsrOperands | None, CsrOperands | None]:
    """A sparse delta on the CPU and on the card; None for no delta."""
    if density is None:
        return None, None
    csr = delta(rows, columns, density, seed)
    return csr, moved(csr)
