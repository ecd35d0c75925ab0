"""What is named for a plan that does not fit is allowed beside the other settings, and fits."""

from __future__ import annotations

from typing import Any

import pytest

from qrosa.planner.search.alternatives import alternatives
from tests.planner.search.test_solve import GB, SHAPES, SMOL, made

LLAMA = SHAPES["Llama-3.1-8B"]


@pytest.mark.parametrize(
    "asked",
    [{"offload": "optimizer"}, {"deepspeed": "zero2", "offload": "none"}, {"deepspeed": "zero3", "micro_batch": "8"}],
    ids=lambda asked: "-".join(asked.values()),
)
def test_deepspeed_keeps_its_optimizer(asked: dict[str, Any]) -> None:
    """8-bit states are not DeepSpeed's, so they are not tried."""
    found = made(LLAMA, 4 * GB, **asked, seq_len=8192)
    assert not found.fits
    ways = {way.setting: way.value for way in alternatives(found)}
    assert "optimizer" not in ways and "vram" in ways


def test_offload_is_freed_around_the_optimizer() -> None:
    found = made(LLAMA, 6 * GB, offload="optimizer")
    ways = {way.setting: way.value for way in alternatives(found)}
    assert not found.fits and ways["offload"] == "auto,optimizer"
    assert made(LLAMA, 6 * GB, offload=ways["offload"]).fits


def test_a_drive_named_after_the_base_stays_what_it_is() -> None:
    drive = "optimizer=nvme:/mnt/base"
    found = made(LLAMA, 6 * GB, offload=f"activations,base,{drive}", micro_batch="1", host_memory="4GB")
    ways = [way.value for way in alternatives(found) if way.setting == "offload" and "disk" in way.value]
    assert ways == [f"activations,base=disk:FOLDER,{drive}"]


def test_on_a_cpu_the_cap_that_is_too_small_is_the_one_named() -> None:
    found = made(SMOL, None, device="cpu", host_memory="200MB")
    ways = {way.setting: way.value for way in alternatives(found)}
    assert not found.fits and "vram" not in ways
    assert made(SMOL, None, device="cpu", host_memory=ways["host_memory"], micro_batch="1").fits


def test_a_disk_named_after_a_space() -> None:
    assert made(LLAMA, 6 * GB, offload="activations, base=disk:/x").offload == "activations,base=disk:/x"
