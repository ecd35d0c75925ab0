"""``qrosa quantize`` from outside: its document, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.real_models import write_config
from qrosa.cli.main import cli


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the film number {n} was good and long"}) + "\n" for n in range(40)))
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["quantize", *arguments, "--device", "cpu"])


def test_prints_one_document(tiny_model_dir: Any, calibration: str, tmp_path: Path) -> None:
    flags = ("--density", "1%", "--calibration", calibration, "--rows", "4", "--seq-len", "32", "--json")
    done = run("--model", str(tiny_model_dir()), "--output", str(tmp_path / "base"), *flags)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["perplexity"]) == {"original", "nearest", "base", "repaired"}
    assert report["settings"]["density"] == 0.01 and (tmp_path / "base" / "adapter").is_dir()


def test_prints_a_table(tiny_model_dir: Any, calibration: str, tmp_path: Path) -> None:
    flags = ("--calibration", calibration, "--rows", "4", "--seq-len", "32")
    done = run("--model", str(tiny_model_dir()), "--output", str(tmp_path / "base"), *flags)
    assert done.exit_code == 0, done.output
    assert "4 bits, to nearest" in done.stdout and "with the repair" not in done.stdout
    assert "use them together" not in done.stdout
    flags = (*flags, "--density", "1%", "--force")
    done = run("--model", str(tiny_model_dir()), "--output", str(tmp_path / "base"), *flags)
    assert "with the repair" in done.stdout and "use them together" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--density", "much"), "--density 'much' is not a share"),
        (("--density", "60%"), "density 0.6 is out of range"),
        (("--calibration", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_refuses(flags: tuple[str, ...], message: str, tiny_model_dir: Any, tmp_path: Path) -> None:
    done = run("--model", str(tiny_model_dir()), "--output", str(tmp_path / "base"), *flags)
    assert done.exit_code == 2 and message in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_evaluated_and_exported_like_a_run(tiny_model_dir: Any, calibration: str, tmp_path: Path) -> None:
    flags = ("--density", "2%", "--rank", "1", "--calibration", calibration, "--rows", "4", "--seq-len", "32")
    base, merged = str(tmp_path / "base"), tmp_path / "merged"
    assert run("--model", str(tiny_model_dir()), "--output", base, *flags).exit_code == 0
    scored = CliRunner().invoke(cli, ["eval", base, "--data", calibration, "--train-on", "all", "--json"])
    assert scored.exit_code == 0, scored.output
    arguments = ["export", base, "--output", str(merged), "--verify", "--data", calibration, "--json"]
    exported = CliRunner().invoke(cli, arguments)
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["verify"]["original"]["mean_kl"] > 0
    card = (merged / "README.md").read_text()
    assert f"made by `qrosa quantize` of {tiny_model_dir().name}" in card and "16-bit model before training" in card
    again = CliRunner().invoke(cli, ["eval", str(merged), "--data", calibration, "--train-on", "all", "--json"])
    assert json.loads(again.stdout)["loss"] == pytest.approx(json.loads(scored.stdout)["loss"], rel=0.05)


def test_says_what_it_takes_and_stops(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    arguments = ["quantize", "--model", str(folder), "--output", str(tmp_path / "base"), "--dry-run"]
    result = CliRunner().invoke(cli, [*arguments, "--gpu", "rtx4090"])
    assert result.exit_code == 0, result.stderr
    for words in ("memory of the pass over the blocks, on rtx4090", "moments", "columns in turn, some", "fits: "):
        assert words in result.stdout
    document = json.loads(CliRunner().invoke(cli, [*arguments, "--gpu", "rtx4090", "--json"]).stdout)
    assert document["bytes"]["total"] < 24 * 2**30 and 10 < document["seconds"] < 600
    assert not (tmp_path / "base").exists()
    result = CliRunner().invoke(cli, [*arguments[:-1], "--gpu", "rtx4090"])
    assert result.exit_code != 0 and "--dry-run" in result.stderr
