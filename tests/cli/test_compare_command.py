"""`qrosa compare`: the table, the document and the page of real runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qrosa.cli.main import cli


def compare(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of three steps that differ in their rate."""
    folder = tmp_path_factory.mktemp("runs")
    rows = folder / "rows.jsonl"
    lines = [{"prompt": f"Review {i}: the film was good\nSentiment:", "completion": " positive"} for i in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = []
    for name, rate in (("slow", "1e-3"), ("fast", "5e-3")):
        arguments = f"--model {tiny_model_dir()} --data {rows} --output {folder / name} --budget 4% --max-steps 3"
        settings = f"--batch-size 2 --mask-samples 2 --eval-split 25% --lr {rate} --sparse-lr 1e-3"
        done = CliRunner().invoke(cli, ["finetune", *arguments.split(), *settings.split()])
        assert done.exit_code == 0, done.output
        made.append(folder / name)
    return made


def test_table_document_and_page(runs: list[Path], tmp_path: Path) -> None:
    done = compare(*runs)
    assert done.exit_code == 0, done.output
    assert "slow" in done.stdout and "--lr" in done.stdout and "--seed" not in done.stdout
    assert "note:" not in done.stdout
    done = compare(*runs, "--json", "--output", tmp_path / "page.html")
    document = json.loads(done.stdout)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    assert document["settings"] == {"lr": [1e-3, 5e-3]}
    for figures, report in zip(document["runs"], reports, strict=True):
        assert (figures["trainable"], figures["seconds"]) == (report["trainable"], report["seconds"])
        assert figures["eval"]["last"]["loss"] == report["eval"]["loss"]
        assert figures["memory"]["measured"] == max(report["memory"]["measured"].values())
        assert set(figures["fingerprints"]) == {"model", "train", "heldout"}
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]  # no temporary name is left
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert compare(*runs, "--output", tmp_path / "page.html").exit_code == 0  # its own page may be made again


@pytest.mark.parametrize(
    ("output", "code", "error"),
    [("notes.txt", 2, "exists and is not a page"), ("folder", 2, "is not a file"), ("gone/page.html", 5, "written")],
)
def test_what_the_page_must_not_be_written_to(
    runs: list[Path], tmp_path: Path, output: str, code: int, error: str
) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "folder").mkdir()
    done = compare(*runs, "--output", tmp_path / output)
    assert done.exit_code == code and error in done.stderr and "hint: " in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert not (tmp_path / "gone").exists()
    assert compare(*runs, "--output", tmp_path / "notes.txt", "--force").exit_code == 0


def test_one_run_is_not_compared(runs: list[Path]) -> None:
    for arguments in ([], runs[:1]):
        done = compare(*arguments)
        assert done.exit_code == 2 and "two runs or more" in done.stderr and done.stdout == ""


def test_help_has_an_example() -> None:
    done = compare("--help")
    assert done.exit_code == 0 and "Examples:" in done.output and "qrosa compare run-1 run-2" in done.output
