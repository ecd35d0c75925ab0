"""A phase on the CPU is held to its plan while it runs, and begins without what the one before left in the heap."""

from __future__ import annotations

import pytest
import torch

from qrosa import heap
from qrosa.record.meter import MemoryMeter
from tests.planner.search.test_solve import GB, SMOL, made


def test_phases_are_held_to_their_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    plan = made(SMOL, 16 * GB, device="cpu", seq_len=256)
    planned, phase = plan.planned, plan.phases["train"]
    now = {"resident": 0}
    monkeypatch.setattr(heap, "resident_now", lambda: now["resident"])
    monkeypatch.setattr(heap, "resident", lambda field: now["resident"])
    monkeypatch.setattr(heap, "give_back", lambda: given.append("given"))
    meter = MemoryMeter(torch.device("cpu"), plan=plan)
    for _ in range(2):
        with meter.phase("train"):
            assert heap.bounded()
            now["resident"] = planned["train"] - phase.coming - round(0.125 * phase.host["kept_heap"])
            heap.look()
    assert len(given) == 1  # the phase is new
    with meter.phase("train"):
        now["resident"] += 1
        heap.look()
    assert len(given) == 2 and not heap.bounded()
    assert meter.peaks == {"train": now["resident"]} and meter.reserved == {}


def test_without_a_plan_nothing_is_held() -> None:
    with MemoryMeter(torch.device("cpu")).phase("load"):
        assert not heap.bounded()
