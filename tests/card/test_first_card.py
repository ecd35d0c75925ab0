"""The first thing to run on a card: a tiny model through everything that only a card can show to work.

Without a card the stand-in takes its place, which minds the order of streams; ``make gpu`` runs this before all else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qrosa.train import step
from qrosa.train.run import finetune

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("any_card")]
Settings = Callable[..., Any]
ROUNDING = 1 << 20  # bytes; a tiny model's tensors are smaller than the pieces that memory is handed out in


def losses(folder: Path | str) -> list[float]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["phase"] != "select"]


def test_a_run_under_a_cap(settings: Settings) -> None:
    report = finetune(settings(eval_split="25%"))
    assert report["steps"] == 4
    peaks, planned = report["memory"]["measured"], report["memory"]["planned"]
    over = {phase: peaks[phase] - planned[phase] for phase in ("load", "select", "train", "eval")}
    assert max(over.values()) <= ROUNDING, over
    assert report["memory"]["overhead"]["context"] > 0


@pytest.mark.parametrize("offload", ["activations", "base", "activations,base"])
def test_offloaded_runs_are_the_same_run(settings: Settings, tmp_path: Path, offload: str) -> None:
    """Streams and events are in order all the way (the stand-in raises), and the losses are those without."""
    finetune(settings(checkpointing="on", offload="none"))
    plain = losses(tmp_path / "run")
    finetune(settings(offload=offload, output=str(tmp_path / "other")))
    assert losses(tmp_path / "other") == plain


def test_a_base_in_files_is_streamed_and_found_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(settings(checkpointing="on", offload="none"))
    asked = {"offload": f"base=disk:{tmp_path / 'base'}"}
    finetune(settings(**asked, output=str(tmp_path / "first")))
    assert losses(tmp_path / "first") == losses(tmp_path / "run")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.safetensors")}
    assert len(written) == 14

    def refuse(*_: Any) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr("qrosa.base.load.quantize_weight", refuse)
    finetune(settings(**asked, mask_score="squared", sparse_init="zero", output=str(tmp_path / "second")))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.safetensors")} == written


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_keeps_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The micro-batch halves, the effective batch stays, and no finished step is lost."""
    calls, real = [], step.model_loss

    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    def model_loss(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and where == "forward":
            fail()
        loss, count = real(*arguments)
        if len(calls) == 2:
            loss.register_hook(fail)
        return loss, count

    monkeypatch.setattr(step, "model_loss", model_loss)
    report = finetune(settings(offload="activations", micro_batch="4"))
    assert report["steps"] == 4
    assert [change["to"]["rows"] for change in report["micro_batch_changes"]] == [2]


def test_resumed_to_the_bit(settings: Settings, tmp_path: Path) -> None:
    """Fused attention sums in any order unless determinism is strict; the stand-in then rounds otherwise each time."""
    finetune(settings())
    finetune(settings(output=str(tmp_path / "halves"), save_every=2))
    for folder in (tmp_path / "halves" / "checkpoints").glob("step-4"):
        folder.rename(tmp_path / "gone")
    finetune(settings(output=str(tmp_path / "halves"), save_every=2), resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "run")


def test_what_was_trained_is_exported(settings: Settings, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qrosa.cli.main import cli

    finetune(settings())
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--verify"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "merged").glob("*.safetensors"))
