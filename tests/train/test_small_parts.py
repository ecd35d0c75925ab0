"""Memory peaks, interrupts: the parts of a run that stand alone."""

import os
import signal
import threading

import pytest
import torch

from qrosa.errors import StorageError
from qrosa.heap import resident
from qrosa.record.meter import MemoryMeter
from qrosa.train.interrupt import Interrupts


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
