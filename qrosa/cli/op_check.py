"""Whether each op works on a device: a small matrix through all of them, beside what plain torch makes of it.

What is right is computed on the host, so that a card has only the op itself to get wrong. Every kernel that training
and generation take is called: the sparse gradient by both of a card's ways, few rows by the kernel for up to four and
by the one for more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_ERROR = 0.02  # of the largest value: bf16 results of short sums, with room
_ROWS, _COLUMNS, _TOKENS = 64, 128, 32

Tries = dict[str, tuple[Callable[[], Any], Any]]
"""Op -> a call on the device, and what it has to give, on the host."""


def wrong_ops(device: str) -> list[str]:
    """What ops do wrong on a device: fail, as kernels for another kind of card do, or give other values.

    One line a fault; ops that fail with the same words, as all do after a card's first, share theirs.
    """
    from qrosa.errors import first_line

    failed: dict[str, list[str]] = {}
    faults = []
    for name, (run, expected) in _tries(device).items():
        try:
            found = run().cpu()
        except Exception as failure:
            failed.setdefault(first_line(failure), []).append(name)
            continue
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        if not error < _ERROR:
            faults.append(f"{name} is wrong on {device}, by {error:.0%}")
    for words, names in failed.items():
        faults.append(f"{', '.join(names)} {'fails' if len(names) == 1 else 'fail'} on {device}: {words}")
    return faults


def _tries(device: str) -> Tries:
    return _weight_tries(device) | _elementwise_tries(device)


def _weight_tries(device: str) -> Tries:
    """The ops that read a packed matrix, or say where a sparse part goes."""
    import torch

    from qrosa import ops
    from qrosa.ops import reference
    from qrosa.quant.nf4 import NF4Weight

    x, dy, dense = _drawn((_TOKENS, _COLUMNS), (_TOKENS, _ROWS), (_ROWS, _COLUMNS))
    packed, x, dy = NF4Weight.quantize(dense), x.bfloat16(), dy.bfloat16()
    row_ptr, diagonal = torch.arange(_ROWS + 1, dtype=torch.int32), torch.arange(_ROWS).to(torch.uint16)
    csr = ops.CsrOperands(row_ptr, diagonal, torch.ones(_ROWS))
    weight = reference.effective_weight(packed.operands(), csr, (_ROWS, _COLUMNS), torch.float32)
    gradient, y = dy.float().t() @ x.float(), x.float() @ weight.t()

    there = packed.to(device).operands()
    delta = ops.CsrOperands(*(tensor.to(device) for tensor in csr))
    x, dy = x.to(device), dy.to(device)

    def decoded() -> Any:
        out = torch.empty(_ROWS, _COLUMNS, device=device)
        ops.dequant_add(there, delta, out)
        return out

    def statistic() -> Any:
        out = torch.zeros(_ROWS, _COLUMNS, device=device)
        ops.score_accumulate(dy, x, out, False)
        return out

    def few(rows: int) -> Callable[[], Any]:
        return lambda: ops.dequant_spmm(x[:rows], there, delta, _ROWS)

    return {
        "dequant_add": (decoded, weight),
        **{name: (run, gradient.diagonal()) for name, run in _sparse_gradients(device, dy, x, delta).items()},
        **{f"dequant_spmm of {rows} rows": (few(rows), y[:rows]) for rows in (1, 4, 8)},
        "score_accumulate": (statistic, gradient),
        "linear": (lambda: ops.linear(x, there, _ROWS, csr=delta), y),
    }


def _sparse_gradients(device: str, dy: Any, x: Any, delta: Any) -> dict[str, Callable[[], Any]]:
    """The sparse gradient by the ways that there are on a device."""
    import torch

    from qrosa import ops
    from qrosa.ops.library import SDDMM_WAYS

    def plain() -> Any:
        return ops.sddmm(dy, x, delta.row_ptr, delta.col)

    def by(way: str) -> Any:
        before = SDDMM_WAYS[torch.ops.qrosa.sddmm_way(-1)]
        ops.force_sddmm_way(way)
        try:
            return plain()
        finally:
            ops.force_sddmm_way(before)

    if not device.startswith("cuda") or ops.status()["cuda"]["library"] is None:
        return {"sddmm": plain}
    return {f"sddmm by {way}": partial(by, way) for way in SDDMM_WAYS[1:]}


def _elementwise_tries(device: str) -> Tries:
    """Norm and gate, forward and backward, and dropout."""
    import torch

    from qrosa.ops import dropout, reference

    x, dy, up = (tensor.bfloat16() for tensor in _drawn(*[(_TOKENS, _COLUMNS)] * 3))
    norm = torch.linspace(0.5, 1.5, _COLUMNS).bfloat16()
    normed, rstd = reference.rms_norm(x, norm, 1e-5, 0.0, True)
    x_there, dy_there, up_there, norm_there, rstd_there = (t.to(device) for t in (x, dy, up, norm, rstd))
    op = torch.ops.qrosa
    return {
        "rms_norm": (lambda: op.rms_norm(x_there, norm_there, 1e-5, 0.0, True)[0], normed.float()),
        "rms_norm_backward": (
            lambda: op.rms_norm_backward(dy_there, x_there, norm_there, rstd_there, 0.0),
            reference.rms_norm_backward(dy, x, norm, rstd, 0.0).float(),
        ),
        "gate": (lambda: op.gate(x_there, up_there, False), reference.gate(x, up, False).float()),
        "gate_backward": (
            lambda: torch.cat(op.gate_backward(dy_there, x_there, up_there, False)),
            torch.cat(reference.gate_backward(dy, x, up, False)).float(),
        ),
        "dropout": (lambda: op.dropout(x_there, 0.25, 7), dropout.dropout(x, 0.25, 7).float()),
    }


def _drawn(*shapes: tuple[int, int]) -> list[Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw) for shape in shapes]
