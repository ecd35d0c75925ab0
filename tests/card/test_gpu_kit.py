"""A rehearsal of ``make gpu`` and of the kit: every part on the stand-in, with small shapes; what fails is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import compare_plan, compare_qlora, gpu, gpu_kit, gpu_measure, gpu_ops, random_checkpoint
from tests.bench.test_random_checkpoint import TINY
from tests.card.standin.device import StandIn

MODEL = "llama-3.1-8b"


@pytest.fixture
def small(card: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shapes of a few hundred rows, results in a folder of their own, and each measurement in this process."""
    from click.testing import CliRunner

    from qrosa.cli.main import cli

    monkeypatch.setattr(gpu_measure, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_measure, "CACHE_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_measure, "PEAK_SIDE", 64)
    monkeypatch.setattr(gpu_ops, "SHAPES", ((128, 64), (192, 64), (64, 128)))
    monkeypatch.setattr(gpu_ops, "TOKENS", (32, 64))
    monkeypatch.setattr(gpu_ops, "CROSSING", (0.01,))
    for module in (compare_plan, compare_qlora, random_checkpoint):
        monkeypatch.setitem(module.SHAPES, MODEL, TINY)
    for name, value in {"CAP": 4 << 30, "SEQUENCE": 32, "STEPS": 1, "WARMUP": 1, "BUDGET": 0.03}.items():
        monkeypatch.setattr(compare_qlora, name, value)
    monkeypatch.setattr(compare_qlora, "in_its_own_process", compare_qlora.measure)

    def plan(folder: Path, case: compare_plan.Case, seq_len: int, *flags: str) -> tuple[list[str], dict[str, Any]]:
        asked = ["plan", "--model", str(folder), "--vram", "4GB", "--seq-len", "32", "--json", "--budget", "3%", *flags]
        done = CliRunner().invoke(cli, asked)
        assert done.exit_code == 0, done.output
        return asked, json.loads(done.stdout)

    monkeypatch.setattr(compare_plan, "plan", plan)
    monkeypatch.setitem(compare_plan.CASES, MODEL, compare_plan.CASES[MODEL][:1])
    return tmp_path


@pytest.mark.parametrize("part", ["ops", "layer", f"plan-{MODEL}"])
def test_a_part_runs_through(small: Path, part: str) -> None:
    assert gpu.main(["--part", part]) == 0
    (file,) = small.glob("*.json")
    rows = json.loads(file.read_text())["parts"][part]["rows"]
    assert rows and not any(row.get("failed") for row in rows)


@pytest.mark.parametrize("system", ["qrosa", "qrosa-sparse"])
def test_steps_are_measured_under_the_runs_own_set_up(small: Path, card: StandIn, system: str) -> None:
    row = compare_qlora.measure(MODEL, system, 1)
    assert row["tokens_per_s"] > 0 and row["peak_allocated"] > 0
    assert card.memory.lowest_fraction < 1


def test_each_row_is_saved_and_a_failure_is_told(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"op": "first", "us": 1.0}
        assert json.loads(next(small.glob("*.json")).read_text())["parts"]["ops"]["rows"] == [
            {"op": "first", "us": 1.0}
        ]
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(gpu.PARTS, "ops", broken)
    assert gpu.main(["--part", "ops"]) == 1
    rows = json.loads(next(small.glob("*.json")).read_text())["parts"]["ops"]["rows"]
    assert rows[0]["op"] == "first" and "no kernel image" in rows[1]["failed"]


def test_the_kit_can_be_carried(tmp_path: Path) -> None:
    """Under 60 MB with both libraries, and its runner finds every part."""
    import subprocess
    import sys
    import zipfile

    if not all(list((gpu_kit.ROOT / "qrosa").glob(f"{stem}*.so")) for stem in gpu_kit.LIBRARIES):
        pytest.skip("the compiled libraries are not both built")
    assert gpu_kit.pack(tmp_path / "kit", "130") < gpu_kit.MOST
    names = zipfile.ZipFile(tmp_path / "kit" / "source.zip").namelist()
    assert {"qrosa/cli/main.py", "bench/gpu.py", "tests/card/test_first_card.py"} <= set(names)
    packed = [n for n in zipfile.ZipFile(tmp_path / "kit" / "packages.zip").namelist() if n.endswith(".so")]
    assert sum("bitsandbytes_cuda" in name for name in packed) == 1
    command = [sys.executable, "run.py", "--list"]
    done = subprocess.run(command, cwd=tmp_path / "kit", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["first-card", "op-tests", *gpu.PARTS]
