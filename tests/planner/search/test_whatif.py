"""What-if rows: each answer fits, one step beyond does not, and each lever reaches farther."""

from __future__ import annotations

import functools
import io
import json
import math
from typing import Any

import pytest

from bench.real_models import LARGE, MODELS, SMOLLM2
from qrosa.base.shape import ModelShape, from_config
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.planner.bytes.peaks import PhaseMemory
from qrosa.planner.bytes.phases import phases
from qrosa.planner.cards import CARDS, Machines
from qrosa.planner.plan import Plan
from qrosa.planner.search import solve
from qrosa.planner.search.whatif import LENGTH_STEP, MEMORY_STEP, WhatIf, what_if
from qrosa.planner.show import document, what_if_table
from qrosa.planner.workload import Workload
from tests.plans import plan

GB = 2**30
SHAPES = {name: from_config(name, model.config) for name, model in (MODELS | LARGE).items()}
SMOL = from_config("smol", SMOLLM2)
CASES = [("Llama-3.1-8B", 24), ("Llama-3.1-8B", 6), ("Gemma-2-9B", 12), ("Phi-3-medium", 16), ("Llama-3.1-70B", 24)]
NAMES = [f"{name}-{gigabytes}" for name, gigabytes in CASES]


def made(shape: ModelShape, vram: int, *, seq_len: int | None = None, device: str = "cuda", **train: Any) -> Plan:
    """A plan with the budget that the recipes have."""
    data, settings = DataConfig(seq_len=seq_len), TrainConfig(**train)
    return plan(shape, AdapterConfig(budget="0.3%"), MaskConfig(), data, settings, vram=vram, device=device)


@functools.cache
def rows(name: str, gigabytes: int) -> list[WhatIf]:
    return what_if(made(SHAPES[name], gigabytes * GB))


def forced(name: str, vram: int, row: WhatIf, **more: Any) -> Plan:
    """The plan that asks for a row's levers."""
    return made(SHAPES[name], vram, checkpointing="on" if row.checkpointing else "off", offload=row.offload, **more)


@pytest.mark.parametrize(("name", "gigabytes"), CASES, ids=NAMES)
def test_the_longest_rows_fit_and_longer_ones_do_not(name: str, gigabytes: int) -> None:
    limit = SHAPES[name].dims.max_positions
    for row in rows(name, gigabytes):
        longest = row.longest_seq_len or 0
        if longest:
            assert forced(name, gigabytes * GB, row, seq_len=longest).fits
        if longest < limit:
            assert not forced(name, gigabytes * GB, row, seq_len=min(longest + LENGTH_STEP, limit)).fits


@pytest.mark.parametrize(("name", "gigabytes"), CASES, ids=NAMES)
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(name: str, gigabytes: int) -> None:
    for row in rows(name, gigabytes):
        most = row.largest_micro_batch or 0
        for count, fits in ((most, True), (most + 1, False)):
            if count:
                asked = {"micro_batch": str(count), "batch_size": count}
                assert forced(name, gigabytes * GB, row, **asked).fits is fits


@pytest.mark.parametrize(("name", "gigabytes"), CASES, ids=NAMES)
def test_the_smallest_card_does_and_a_smaller_one_does_not(name: str, gigabytes: int) -> None:
    for row in rows(name, gigabytes):
        assert forced(name, row.smallest_card, row).fits
        assert not forced(name, int(row.smallest_card - MEMORY_STEP), row).fits
        assert forced(name, math.ceil(row.smallest_card / GB * 10) * GB // 10 + 1, row).fits  # as --vram would be given


def test_levers_reach_farther_one_by_one() -> None:
    none, recompute, activations, both, base = rows("Llama-3.1-8B", 24)
    lengths = [row.longest_seq_len or 0 for row in (none, recompute, activations, both)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[3]
    cards = [row.smallest_card for row in (none, recompute, activations, both)]
    assert cards == sorted(cards, reverse=True)
    assert both.host > activations.host > recompute.host == none.host
    assert recompute.smallest_card > base.smallest_card > both.smallest_card
    assert [row.words for row in (none, both, base)] == [
        "no lever",
        "recompute, activations and base on host",
        "recompute, base on host",
    ]


def test_exactly_one_row_is_what_the_plan_does() -> None:
    for name, gigabytes in CASES:
        found = made(SHAPES[name], gigabytes * GB)
        (chosen,) = [row for row in what_if(found) if row.planned]
        assert (chosen.checkpointing, chosen.offload) == (found.work.checkpointing, found.offload)


def test_speeds_come_with_a_card_and_only_where_something_fits() -> None:
    llama, card = SHAPES["Llama-3.1-8B"], Machines(CARDS["rtx3080"])
    found = plan(llama, AdapterConfig(budget="0.3%"), MaskConfig(), DataConfig(), TrainConfig(), machines=card)
    none, recompute, *_ = what_if(found)
    assert none.largest_micro_batch is None and none.tokens_per_s is None
    estimated = found.estimate()
    assert recompute.planned and estimated is not None
    assert recompute.tokens_per_s == estimated.tokens_per_second and recompute.step_seconds == estimated.step_seconds
    assert all(row.tokens_per_s is None for row in rows("Llama-3.1-8B", 24))


def test_the_cpu_has_no_host_to_move_things_to() -> None:
    found = what_if(made(SMOL, 8 * GB, seq_len=512, device="cpu"))
    assert [(row.checkpointing, row.offload) for row in found] == [(False, "none"), (True, "none")]
    assert all(row.largest_micro_batch for row in found)


def test_short_rows_do_not_bound_the_longest() -> None:
    llama = SHAPES["Llama-3.1-8B"]
    groups = (AdapterConfig(budget="0.3%"), MaskConfig(), DataConfig(), TrainConfig())
    short = what_if(plan(llama, *groups, vram=24 * GB, longest_row=100))
    long = rows("Llama-3.1-8B", 24)
    assert [row.longest_seq_len for row in short] == [row.longest_seq_len for row in long]
    assert (short[1].largest_micro_batch or 0) > 10 * (long[1].largest_micro_batch or 0)


def test_a_base_on_disk_stays_there() -> None:
    found = made(SHAPES["Llama-3.1-8B"], 5 * GB, offload="base=disk:/scratch")
    offloads = [row.offload for row in what_if(found)]
    assert offloads[-2:] == ["activations,base=disk:/scratch", "base=disk:/scratch"]


def test_the_document_and_the_table_hold_the_rows() -> None:
    from rich.console import Console

    found = made(SHAPES["Mistral-7B"], 8 * GB)
    shown = json.loads(json.dumps(document(found)))["what_if"]
    assert [row["planned"] for row in shown].count(True) == 1
    assert shown[1]["smallest_card_name"] == "rtx4060"
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(what_if_table(found, what_if(found)))
    text = console.export_text()
    assert "recompute, base on host" in text and "(plan)" in text and "tokens/s" not in text


def test_a_row_is_some_hundred_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisections over the closed form, not a walk: what keeps a plan of any model under a second."""
    found = made(SHAPES["Llama-3.1-70B"], 24 * GB)
    evaluations = 0

    def counted(work: Workload) -> dict[str, PhaseMemory]:
        nonlocal evaluations
        evaluations += 1
        return phases(work)

    monkeypatch.setattr(solve, "phases", counted)
    found_rows = what_if(found)
    assert len(found_rows) <= evaluations <= 150 * len(found_rows)
