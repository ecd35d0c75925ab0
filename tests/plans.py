"""Plans for tests: from settings groups, or from a few changed settings, on a machine that is said, not asked."""

from __future__ import annotations

from typing import Any

from qrosa.adapters.budget import Allocation
from qrosa.base.shape import ModelShape
from qrosa.base.shape_source import read_shape
from qrosa.config import AdapterConfig, DataConfig, Groups, MaskConfig, TrainConfig, make_groups
from qrosa.planner.hardware import Here
from qrosa.planner.plan import Plan
from qrosa.planner.request import Rows, make_request
from qrosa.planner.search.solve import solve

GB = 2**30
NO_CARD = Here(card=None, host=20 * GB)


def plan(
    model: str | ModelShape,
    adapter: AdapterConfig,
    masks: MaskConfig,
    data: DataConfig,
    train: TrainConfig,
    *,
    here: Here = NO_CARD,
    longest_row: int | None = None,
    row_tokens: int = 0,
    row_count: int = 0,
    allocation: Allocation | None = None,
    **where: Any,
) -> Plan:
    """A plan from groups of settings; ``where`` holds ``vram``, ``device`` and ``machines``."""
    shape = read_shape(model) if isinstance(model, str) else model
    groups = Groups(adapter, masks, data, train)
    return solve(make_request(shape, groups, here, rows=Rows(longest_row, row_tokens, row_count), **where), allocation)


def made(shape: ModelShape, vram: int | None = 24 * GB, **changes: Any) -> Plan:
    """A plan with a budget of 0.3% and some settings changed, by name."""
    options = ("longest_row", "device", "row_tokens", "row_count", "machines", "here")
    extra = {key: changes.pop(key) for key in options if key in changes}
    return plan(shape, *make_groups({"budget": "0.3%"} | changes), vram=vram, **extra)
