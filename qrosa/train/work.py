"""What the training loop works on, and the line that it logs of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qrosa.config import RunConfig
from qrosa.optim.parts import Optimizer
from qrosa.optim.schedule import Phases
from qrosa.record.meter import MemoryMeter
from qrosa.record.state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qrosa.data.encode import EncodedRow


@dataclass
class Work:
    """What a loop works on.

    Attributes:
        config: The run's settings.
        phases: Length of the phases.
        folder: The run folder.
        model: The base with its adapters.
        optimizer: Owner of masters and gradients.
        rows: Training rows.
        heldout: Rows to evaluate on; may be empty.
        pad_id: Token to pad with.
        state: What changes.
        accelerator: Device, and the other processes.
        meter: Memory peaks.
        identity: ``settings`` and ``fingerprints``, stored with each checkpoint.
        select: Picks the masks and returns (tokens, supervised tokens) that it read; called once, with what is told of
            (samples done, samples to do) and may end it by raising.
        write_adapter: Saves the adapter into a folder.
        planned: Phase -> bytes of the plan.
    """

    config: RunConfig
    phases: Phases
    folder: Path
    model: nn.Module
    optimizer: Optimizer
    rows: Sequence[EncodedRow]
    heldout: Sequence[EncodedRow]
    pad_id: int
    state: RunState
    accelerator: Accelerator
    meter: MemoryMeter
    identity: Mapping[str, Any]
    select: Callable[[Callable[[int, int], None]], tuple[int, int]]
    write_adapter: Callable[[Path], None]
    planned: Mapping[str, int]


def metrics_line(
    step: int,
    phase: str,
    loss: float | None,
    lr: float,
    norm: float | None,
    tokens: int,
    supervised: int,
    tokens_per_s: float,
    memory: int,
) -> dict[str, Any]:
    """One line of ``metrics.jsonl``."""
    return {
        "step": step,
        "phase": phase,
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_s": tokens_per_s,
        "memory": memory,
    }
