"""Charts, memory peaks, interrupts: the parts of a run that stand alone."""

import os
import signal
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from qrosa.errors import StorageError
from qrosa.heap import resident
from qrosa.record.meter import MemoryMeter
from qrosa.report.charts import Series, bar_pairs, heat_map, line_chart, nice_ticks, thin_out
from qrosa.train.interrupt import Interrupts


def svg(markup):
    """The drawing in a chart's markup, parsed; fails when it is not well-formed."""
    return ElementTree.fromstring(markup[markup.index("<svg") :])


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(i, 1 / i) for i in range(1, 2000)]])
def test_a_line_stays_inside_its_chart(points):
    drawing = svg(line_chart([Series("a & b", points), Series("none", [])], form=lambda v: f"{v:.2f}"))
    line = drawing.find("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    assert len(places) <= 500
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in places)
    assert "a & b" in drawing.find("circle").find("title").text


def test_nothing_to_draw_says_so():
    assert "<svg" not in line_chart([Series("a", [])], form=str)
    assert "<svg" not in bar_pairs([("x", None, None)], ("a", "b"), str)
    assert "<svg" not in heat_map({}, form=str)
    assert "<svg" not in heat_map({("q_proj", 0): 0.0}, form=str)


def test_bars_and_heat_maps():
    drawing = svg(bar_pairs([("load", 10.0, 12.0), ("train", None, 20.0)], ("planned", "measured"), str))
    assert len(drawing.findall("rect")) == 3
    values = {(kind, layer): float(layer) for kind in ("q_proj", "up_proj") for layer in range(40)}
    drawing = svg(heat_map(values, form=lambda v: f"{v:g}"))
    assert len(drawing.findall("rect")) == 80
    depths = [float(cell.get("style").split(":")[1]) for cell in drawing.findall("rect")]
    assert min(depths) == 0.0
    assert max(depths) == 1.0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.7), (-3, 1e6), (5, 5), (0, 0), (1e-9, 2e-9)])
def test_ticks_enclose_the_values_and_are_few(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    assert all(y == 0.5 for _, y in thin_out(points, 100))


def test_a_phase_peak_is_its_own():
    meter = MemoryMeter(torch.device("cpu"))
    with meter.phase("large"):
        torch.ones(50 * 2**20 // 4).sum()
    with meter.phase("small"):
        pass
    with meter.phase("small"):
        pass
    assert meter.peaks["large"] - meter.peaks["small"] > 30 * 2**20 or not os.access("/proc/self/clear_refs", os.W_OK)
    assert 0 < meter.now() <= resident("VmHWM")


def test_signals_are_noted_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        assert interrupts.requested is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_handlers_are_left_alone():
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append(interrupts.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_the_plan_is_for_the_device_that_accelerate_takes(monkeypatch):
    from qrosa.train import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert prepare._on_card()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not prepare._on_card()


def test_a_full_drive_is_named_with_its_own_remedy(tmp_path):
    from qrosa.record.folder import check_room

    check_room(tmp_path / "drive", 1)
    with pytest.raises(StorageError, match=f"free in {tmp_path}") as full:
        check_room(tmp_path / "drive", 1 << 60, "name another drive")
    assert full.value.hint == "name another drive"
