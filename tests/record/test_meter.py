"""A run on the CPU gives its heap back when a step begins near the planned bytes, and only then."""

from __future__ import annotations

import pytest
import torch

from qrosa.record import meter as peak
from qrosa.record.meter import MemoryMeter


@pytest.mark.parametrize(("resident", "times"), [(100, 1), (89, 1), (91, 3)])
def test_the_heap_is_given_back_near_the_plan(monkeypatch: pytest.MonkeyPatch, resident: int, times: int) -> None:
    given = []
    monkeypatch.setattr(peak, "resident", lambda field: resident)
    monkeypatch.setattr(peak, "give_back_free_memory", lambda: given.append(True))
    meter = MemoryMeter(torch.device("cpu"), planned={"train": 100} if resident != 100 else {"eval": 1})
    for _ in range(3):
        with meter.phase("train"):
            pass
    assert len(given) == times  # once because the phase is new
    assert meter.peaks == {"train": resident} and meter.reserved == {}
