"""What a report tells of a run, beside its two logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qrosa.optim.schedule import Phases
from qrosa.record.state import RunState


@dataclass(frozen=True)
class ModuleShare:
    """What one module got of the adapter.

    Attributes:
        path: Module path.
        layer: Decoder layer, -1 outside of them.
        rank: Rank of the low-rank part.
        nnz: Sparse values.
        size: Weights, N * K.
        delta_rms: Root mean square of the sparse values.
    """

    path: str
    layer: int
    rank: int
    nnz: int
    size: int
    delta_rms: float

    @property
    def kind(self) -> str:
        """The module's name within its layer."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Facts:
    """Everything that a report tells, beside the logs.

    Attributes:
        settings: The resolved flat settings.
        base: Source, kind and parameters of the base.
        phases: Length of the phases.
        state: The run's last state.
        planned: Phase -> bytes that the plan named.
        modules: Share of each module.
        where: Where the budget went, in words, a line each.
        data: Rows, tokens and what happened to them, as the data report says.
        trainable: Trainable parameters.
        deterministic: The run was held to the same bits every time.
        overhead: What the process took of a card beside tensors, by what it was; empty on the CPU.
        fingerprints: Of the base, and of the rows (those trained on, ``+``, those held out).
        machine: What the run was made on and with, in words.
        samples: Held-out prompts, what was wanted, and what was answered before and after.
    """

    settings: Mapping[str, Any]
    base: Mapping[str, Any]
    phases: Phases
    state: RunState
    planned: Mapping[str, int]
    modules: Sequence[ModuleShare]
    where: Sequence[str]
    data: Mapping[str, Any]
    trainable: int
    deterministic: bool = True
    overhead: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
