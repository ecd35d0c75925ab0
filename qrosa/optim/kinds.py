"""The optimizers that there are: one entry each, with everything that depends on which one it is.

Settings, help, plan and training read this table; to add an optimizer, add its entry. Torch-free until ``make`` is
called. Each updates one flat fp32 master with one flat fp32 gradient (see ``qrosa.optim.adamw``), both of them 4 bytes
a value and not counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_FP32 = 4
_BLOCK, _MINIMUM, _CODE_TABLE = 256, 4096, 1024  # bitsandbytes' 8-bit states; smaller tensors stay in fp32


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        name: As ``--optimizer`` takes it.
        words: What it is, for the flag's help.
        state_bytes: Values of a flat part -> bytes of its states.
        step_bytes: Bytes a value that an update moves: gradient in, master and states in and out.
        make: ``make(master, weight_decay)`` -> the torch optimizer of one flat fp32 parameter.
        stand_in: The same arithmetic without paging, for devices that have nothing to page to; None where states are
            not paged.
        shared: DeepSpeed can share it out over processes and keep it on the host.
    """

    name: str
    words: str
    state_bytes: Callable[[int], int]
    step_bytes: int
    make: Callable[[Any, float], Any]
    stand_in: str | None = None
    shared: bool = False

    @property
    def paged(self) -> bool:
        """The driver moves its states between card and host."""
        return self.stand_in is not None


def _two_fp32(size: int) -> int:
    return 2 * _FP32 * size


def _two_8bit(size: int) -> int:
    """A byte a value, an fp32 absmax a block and a table of codes, twice."""
    return _two_fp32(size) if size < _MINIMUM else 2 * (size + _FP32 * -(-size // _BLOCK) + _CODE_TABLE)


def _adamw(master: Any, weight_decay: float) -> Any:
    import torch

    fused = master.device.type in ("cpu", "cuda")
    return torch.optim.AdamW([master], betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=fused or None)


def _bitsandbytes(name: str) -> Callable[[Any, float], Any]:
    def make(master: Any, weight_decay: float) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
        return getattr(bitsandbytes.optim, name)([master], betas=BETAS, eps=EPSILON, weight_decay=weight_decay)

    return make


_TABLE = (
    OptimizerKind("adamw", "AdamW with fp32 states", _two_fp32, 28, _adamw, shared=True),
    OptimizerKind("adamw8bit", "bitsandbytes' AdamW with 8-bit states", _two_8bit, 16, _bitsandbytes("AdamW8bit")),
    OptimizerKind(
        "paged-adamw8bit",
        "that, with states that leave a full card for host memory",
        _two_8bit,
        16,
        _bitsandbytes("PagedAdamW8bit"),
        stand_in="adamw8bit",
    ),
)
OPTIMIZERS = {kind.name: kind for kind in _TABLE}
SHARED = next(kind for kind in _TABLE if kind.shared)
"""The optimizer that DeepSpeed runs."""


def leanest() -> OptimizerKind:
    """The optimizer that takes the least memory on the device without paging."""
    return min((kind for kind in _TABLE if not kind.paged), key=lambda kind: kind.state_bytes(1 << 20))


def describe_optimizers() -> str:
    """The optimizers as the flag's help tells them."""
    return "; ".join(f"{kind.name}: {kind.words}" for kind in _TABLE)
