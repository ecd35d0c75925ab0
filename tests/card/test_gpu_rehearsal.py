"""A rehearsal of ``make gpu``: every part on the stand-in with small shapes; what fails or takes too long is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare_plan, compare_qlora, deadline, gpu, gpu_measure, gpu_ops, random_checkpoint
from qrosa import ops
from tests.bench.test_random_checkpoint import TINY
from tests.card.standin.device import StandIn

ROOT = Path(__file__).resolve().parents[2]
MODEL = "llama-3.1-8b"
Rows = list[dict[str, Any]]


@pytest.fixture
def small(card: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shapes of a few hundred rows, results in a folder of their own, and each measurement in this process."""
    monkeypatch.setattr(gpu_measure, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_measure, "CACHE_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_measure, "PEAK_SIDE", 64)
    monkeypatch.setattr(gpu_ops, "SHAPES", ((128, 64), (192, 64), (64, 128)))
    monkeypatch.setattr(gpu_ops, "TOKENS", (32, 64))
    monkeypatch.setattr(gpu_ops, "CROSSING", (0.01,))
    for name in random_checkpoint.SHAPES:
        monkeypatch.setitem(random_checkpoint.SHAPES, name, TINY)
    for name, value in {"CAP": 4 << 30, "SEQUENCE": 32, "STEPS": 1, "WARMUP": 1, "BUDGET": 0.03}.items():
        monkeypatch.setattr(compare_qlora, name, value)
    monkeypatch.setattr(compare_qlora, "in_its_own_process", compare_qlora.measure)
    monkeypatch.setattr(gpu, "in_its_own_process", gpu.run)
    return tmp_path


@pytest.fixture(scope="module")
def probed() -> Rows:
    """The document of the module's one probe, once it is made."""
    return []


@pytest.fixture
def planned_here(small: Path, probed: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """``qrosa plan`` in this process, its tiny model under 4 GB; one probe is made, and its document stands for all."""
    from click.testing import CliRunner

    from qrosa.cli.main import cli

    def plan(folder: Path, case: compare_plan.Case, seq_len: int, *flags: str) -> tuple[list[str], dict[str, Any]]:
        asked = ["plan", "--model", str(folder), "--vram", "4GB", "--seq-len", "32", "--json", "--budget", "3%", *flags]
        if "--probe" in flags and probed:
            return asked, probed[0]
        done = CliRunner().invoke(cli, asked)
        assert done.exit_code == 0, done.output
        document = json.loads(done.stdout)
        if "--probe" in flags:
            probed.append(document)
        return asked, document

    monkeypatch.setattr(compare_plan, "plan", plan)


def parts_in(folder: Path) -> dict[str, Rows]:
    (file,) = folder.glob("*.json")
    return {name: part["rows"] for name, part in json.loads(file.read_text())["parts"].items()}


def test_all_parts_run_through(small: Path, planned_here: None) -> None:
    """As ``make gpu`` calls it; a row for each measurement, and none of them failed."""
    assert gpu.main([]) == 0
    found = parts_in(small)
    assert list(found) == list(gpu.PARTS)
    assert not [row for rows in found.values() for row in rows if row.get("failed")]
    assert {row["op"] for row in found["ops"]} == {"peaks", "dequant_add", "sddmm", "dequant_spmm", "score_accumulate"}
    for model in gpu.SMALL:
        systems = [(row["rows"], row["system"]) for row in found[f"steps-{model}"]]
        assert systems == [(count, system) for count in (1, 2) for system in compare_qlora.SYSTEMS]
        assert all("over_peft" in row for row in found[f"steps-{model}"])
    for model in compare_plan.CASES:
        assert [row["case"] for row in found[f"plan-{model}"]] == [case.name for case in compare_plan.CASES[model]]
    assert "over_resident" in found[f"plan-{MODEL}"][3]


def test_steps_are_measured_under_the_runs_own_set_up(small: Path, card: StandIn) -> None:
    for system in compare_qlora.SYSTEMS:
        card.memory.lowest_fraction = 1.0
        row = compare_qlora.measure(MODEL, system, 1)
        assert row["tokens_per_s"] > 0 and row["peak_allocated"] > 0
        assert card.memory.lowest_fraction < 1


def test_an_op_that_fails_leaves_the_other_rows(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("score_accumulate: no kernel image is available\nraised from ...")

    assert gpu.main(["--part", "ops"]) == 0
    whole = parts_in(small)["ops"]
    monkeypatch.setattr(ops, "score_accumulate", broken)
    assert gpu.main(["--part", "ops"]) == 1
    rows = parts_in(small)["ops"]
    assert len(rows) == len(whole)
    failed = [row for row in rows if row.get("failed")]
    assert [row["shape"] for row in failed] == ["128x64", "192x64"]
    assert failed[0]["op"] == "score_accumulate" and failed[0]["failed"].endswith("no kernel image is available")


def test_a_case_that_fails_leaves_the_other_cases(
    small: Path, planned_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_plan, "longest", lambda folder, case: 1 // 0)
    assert gpu.main(["--part", f"plan-{MODEL}"]) == 1
    rows = parts_in(small)[f"plan-{MODEL}"]
    assert [bool(row.get("failed")) for row in rows] == [False, True, False, False, False]
    assert rows[1]["case"] == "24 GB, longest rows" and "ZeroDivisionError" in rows[1]["failed"]


def test_a_part_is_cut_with_what_it_has(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the code that waits catches every exception; and each row is in the file before the next begins."""

    def slow() -> Iterator[gpu_measure.Measurement]:
        yield {"op": "first"}, lambda: [{"op": "first", "us": 1.0}]

        def waits() -> Rows:
            assert parts_in(small)["ops"] == [{"op": "first", "us": 1.0}]
            try:
                time.sleep(20)
            except Exception:
                return []
            return [{"op": "late"}]

        yield {"op": "second"}, waits
        yield {"op": "third"}, lambda: [{"op": "third"}]

    monkeypatch.setitem(gpu.PARTS, "ops", slow)
    monkeypatch.setattr(gpu, "LIMIT", 0.2)
    begun = time.monotonic()
    assert gpu.main(["--part", "ops"]) == 1
    assert time.monotonic() - begun < 10
    assert parts_in(small)["ops"] == [{"op": "first", "us": 1.0}, {"failed": "CutError: cut after 0.2 s"}]


def test_a_cut_ends_the_process_that_is_waited_for() -> None:
    begun = time.monotonic()
    with pytest.raises(deadline.CutError), deadline.cut_after(0.3, 30, lambda: None):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(20)"], check=False)
    assert time.monotonic() - begun < 10


def test_a_card_that_hangs_ends_the_process() -> None:
    """The main thread hears no signal, as in a driver's call; what was measured is in the file already."""
    code = """
import signal, time
from bench.deadline import cut_after
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
with cut_after(0.1, 0.2, lambda: print("last words", flush=True)):
    time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (deadline.HUNG, "last words\n")


def test_an_earlier_runs_rows_do_not_stay(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_measure.Results("ops").add({"op": "old"})
    gpu_measure.Results("layer").add({"op": "kept"})
    monkeypatch.setitem(gpu.PARTS, "ops", lambda: (found for found in ()))
    assert gpu.main(["--part", "ops"]) == 0
    assert parts_in(small) == {"ops": [], "layer": [{"op": "kept"}]}


def test_the_cache_is_flushed_by_reading(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that were written would be written back while the next candidate runs."""
    done: list[str] = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: done.append("flush"))
    gpu_measure.seconds({"one": lambda: done.append("run")}, rounds=2, warmup=1)
    assert done == ["flush", "run"] * 3


def test_make_gpu_goes_on_after_a_failure(tmp_path: Path) -> None:
    """Its lines as they are, with an interpreter that only notes what it was called for."""
    note = tmp_path / "python"
    note.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *"-q "*tests/card) exit 1;; esac\n')
    note.chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "MAKEFLAGS": ""}
    command = [make, "-o", "build", "gpu", f"PY={note}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 2, done.stderr
    assert [call.split()[-1] for call in calls] == ["tests/card", "tests/card", "bench.gpu"]
    assert "--ignore tests/card" in calls[1]
