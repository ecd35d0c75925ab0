"""Probing: real steps of the planned settings, nothing written, honest about what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qrosa.cli.main import cli
from qrosa.errors import DoesNotFitError, InputError
from qrosa.measure import probe as probing
from qrosa.measure.probe import Probe, probe, worst_rows
from qrosa.planner.plan import Plan
from qrosa.train.step import StepRunner

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a card is probed in GPU tests")


def planned(source: Path, **values: Any) -> Plan:
    from qrosa.cli.plan import make_plan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"budget": "2%", "batch_size": 4, "micro_batch": "2", "seq_len": 32}
    return make_plan(str(source), settings | values, device=device)


def test_smollm2_on_the_command_line(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(smollm2))
    asked = ["plan", "--model", str(smollm2), "--budget", "0.3%", "--seq-len", "48", "--batch-size", "2", "--probe"]
    result = CliRunner().invoke(cli, [*asked, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["probe"]
    for phase in ("load", "select", "train", "eval"):
        assert found[phase]["measured"] > 2**28  # SmolLM2 in 4 bits with its embeddings, on any device
        assert found[phase]["ratio"] == pytest.approx(found[phase]["planned"] / found[phase]["measured"])
    assert found["fits"] and found["failed"] is None
    assert found["step_seconds"] == pytest.approx(found["micro_batch_seconds"] + found["optimizer_seconds"])
    assert found["tokens_per_s"] == pytest.approx(2 * 48 / found["step_seconds"])
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(smollm2)) == before


def test_phases_and_people(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path]) -> None:
    asked = ["plan", "--model", str(tiny_model_dir("qwen3")), "--budget", "2%", "--data", str(tiny_rows()), "--probe"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.stderr
    assert "Memory, planned and measured" in result.stdout and "tokens/s" in result.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_score": "repair", "mask_scope": "global"},
        {"mask_score": "residual"},
        {"mask_score": "random", "optimizer": "adamw8bit"},
        {"offload": "activations,base"},
        {"offload": "auto,optimizer"},
        {"deepspeed": "zero3"},
        {"sparse_share": "0"},
        {"sparse_share": "1"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_setting_that_changes_memory(tiny_model_dir: Callable[..., Path], changes: dict[str, Any]) -> None:
    if "deepspeed" in changes or "optimizer" in changes.get("offload", ""):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    made = planned(tiny_model_dir("llama"), **changes)
    found = probe(str(tiny_model_dir("llama")), made)
    assert set(found.measured) == set(made.phases) - {"save", "export"}
    assert found.fits and found.step_seconds


def test_the_micro_batch_is_the_planned_one(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def gradients(self: StepRunner, rows: Any, step: int, normaliser: int) -> float:
        seen.append(([len(row.input_ids) for row in rows], normaliser))
        return real(self, rows, step, normaliser)

    real = StepRunner.gradients
    monkeypatch.setattr(StepRunner, "gradients", gradients)
    made = planned(tiny_model_dir("llama"), micro_batch="3")
    probe(str(tiny_model_dir("llama")), made)
    assert seen == [([32, 32, 31], 31 + 31 + 30)] * (probing.WARM_UP + probing.MEASURED)
    assert len(worst_rows(made.work, 512, 0)) == 3


@pytest.mark.parametrize("where", ["choose_positions", "StepRunner", "evaluate_loss"])
def test_running_out_of_memory_names_the_phase(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    if where == "StepRunner":
        monkeypatch.setattr("qrosa.train.step.model_loss", fail)
    else:
        monkeypatch.setattr(probing, where, fail)
    phase = {"choose_positions": "select", "StepRunner": "train", "evaluate_loss": "eval"}[where]
    found = probe(str(tiny_model_dir("llama")), planned(tiny_model_dir("llama")))
    assert found.failed == phase and not found.fits
    with pytest.raises(DoesNotFitError, match=phase):
        found.require_fit()


@needs_cpu
def test_more_than_the_cap_exits_with_3(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrosa.heap.resident", lambda field: 2**50)
    result = CliRunner().invoke(
        cli, ["plan", "--model", str(tiny_model_dir("llama")), "--budget", "2%", "--probe", "--json"]
    )
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["probe"]["fits"] is False and "the probe does not fit" in result.stderr


def test_a_plan_that_does_not_fit_is_not_probed(tiny_model_dir: Callable[..., Path]) -> None:
    asked = ["plan", "--model", str(tiny_model_dir("llama")), "--budget", "2%", "--vram", "1MB", "--probe", "--json"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 3 and "probe" not in json.loads(result.stdout)


def test_a_base_that_is_mapped_from_files_is_refused(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    made = planned(tiny_model_dir("llama"), offload=f"base=disk:{tmp_path / 'blocks'}")
    with pytest.raises(InputError, match="writes nothing"):
        probe(str(tiny_model_dir("llama")), made)
    assert not (tmp_path / "blocks").exists()


def test_an_optimizer_on_a_drive_is_refused(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    made = planned(tiny_model_dir("llama"), offload=f"auto,optimizer=nvme:{tmp_path / 'drive'}")
    with pytest.raises(InputError, match="writes nothing"):
        probe(str(tiny_model_dir("llama")), made)
    assert not (tmp_path / "drive").exists()


def test_several_processes_are_refused(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        probe(str(tiny_model_dir("llama")), planned(tiny_model_dir("llama")))


@needs_cpu
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_deepspeeds_optimizer_is_the_one_that_runs(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    """With the planned settings, and closed whatever happens."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from qrosa.optim.zero.engine import ZeroEngine

    seen: list[Any] = []
    real, close = ZeroEngine.step, ZeroEngine.close

    def step(self: ZeroEngine, *arguments: Any) -> float:
        seen.append(self.settings)
        return real(self, *arguments)

    monkeypatch.setattr(ZeroEngine, "step", step)
    monkeypatch.setattr(ZeroEngine, "close", lambda self: (seen.append("closed"), close(self))[1])
    monkeypatch.setattr(probing, "evaluate_loss", lambda *_, **__: 1 / 0)
    made = planned(tiny_model_dir("llama"), deepspeed="zero2", offload=offload)
    with pytest.raises(ZeroDivisionError):
        probe(str(tiny_model_dir("llama")), made)
    assert seen == [made.work.zero] * (probing.WARM_UP + probing.MEASURED) + ["closed"]


def test_what_a_card_reserves_counts() -> None:
    cramped = Probe({"train": 90}, {"train": 90}, {"train": 120}, None, cap=100)
    assert not cramped.fits and cramped.peak == 120
    assert cramped.to_json()["train"] == {"planned": 90, "measured": 90, "ratio": 1.0, "reserved": 120}
