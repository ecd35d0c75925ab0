"""The plan of a run: what memory each phase takes, and the settings that make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.adapters.budget import Allocation
from qrosa.config import RunConfig
from qrosa.memory.shape import ModelShape
from qrosa.train.step import Limits

if TYPE_CHECKING:
    from qrosa.data.dataset import Dataset


@dataclass(frozen=True)
class RunPlan:
    limits: Limits
    eval_tokens: int
    chunk_tokens: int
    checkpointing: bool
    group_bytes: int | None
    planned: Mapping[str, int]
    cap: int | None
    document: dict[str, Any]


def plan_run(config: RunConfig, shape: ModelShape, allocation: Allocation, train: Dataset, heldout: Dataset | None) -> RunPlan:
    rows = 8 if config.train.micro_batch == "auto" else int(config.train.micro_batch)
    longest = train.report.longest
    return RunPlan(Limits(rows, rows * longest), 4096, 256, config.train.checkpointing == "on", None, {}, None, {})
