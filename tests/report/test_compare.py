"""Runs side by side: every figure from the files of the runs, and what is not comparable is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrosa.errors import InputError, StorageError
from qrosa.report.compare import Comparison
from qrosa.report.compare_page import page

MakeRun = Any


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run("a", lr=1e-3)``: a run folder of 20 steps with these settings; further names change its files."""

    def make(
        name: str,
        *,
        steps: int = 20,
        finished: bool = True,
        evals: tuple[tuple[int, float], ...] = ((10, 1.5), (20, 1.75)),
        data: str = "aa11+bb22",
        **settings: Any,
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        values = {"model": "m", "data": ["rows.jsonl"], "output": str(run), "budget": "4%", **settings}
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        lines = [{"step": 2, "phase": "select", "loss": None, "tokens": 10, "tokens_per_s": 1.0, "memory": 900}]
        lines += [
            {"step": s, "phase": "train", "loss": 4.0 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100,
             "tokens_per_s": 50.0, "memory": 500 + s}
            for s in range(1, steps + 1)
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "eval.jsonl").write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in evals))
        (run / "plan.json").write_text(json.dumps({"peak": 2000, "budget": {"trainable": 7, "share": 0.07}}))
        if finished:
            memory = {"planned": {"train": 1000, "export": 9999}, "measured": {"train": 990}}
            figures = {"trainable": 5, "share": 0.05, "seconds": 41.0, "tokens_per_s": 48.0, "memory": memory}
            fingerprints = {"model": "cc33", "data": data}
            (run / "report.json").write_text(json.dumps({**figures, "fingerprints": fingerprints}))
        return run

    return make


def test_answers_told_apart_stand_beside_the_loss(make_run: MakeRun) -> None:
    plain, compared = make_run("a"), make_run("b", objective="dpo")
    (compared / "eval.jsonl").write_text(json.dumps({"step": 20, "loss": 0.5, "accuracy": 0.75, "margin": 1.0}) + "\n")
    comparison = Comparison([plain, compared])
    assert "the objectives differ: losses are of different things" in comparison.notes
    words = dict((what, texts) for what, *texts in comparison.rows())
    assert words["answers told apart, last"] == ["unknown", "75.0%"]
    assert "answers told apart, last" not in [row[0] for row in Comparison([plain, make_run("c")]).rows()]


def test_figures_of_finished_runs(make_run: MakeRun) -> None:
    comparison = Comparison([make_run("a"), make_run("b", lr=2e-3, evals=(), seed=7, log_to=["wandb"])])
    document = comparison.document()
    first, second = document["runs"]
    assert (first["name"], first["finished"], first["steps"]) == ("a", True, 20)
    assert (first["trainable"], first["share"], first["seconds"], first["tokens_per_s"]) == (5, 0.05, 41.0, 48.0)
    assert first["eval"] == {"best": {"step": 10, "loss": 1.5}, "last": {"step": 20, "loss": 1.75}}
    assert first["memory"] == {"planned": 1000, "measured": 990}  # of the phases that were measured
    assert document["smoothed_over"] == 2
    assert first["loss"] == {"smoothed": pytest.approx((4 / 19 + 4 / 20) / 2), "last": 4 / 20}
    assert second["eval"] == {"best": None, "last": None}
    assert document["settings"] == {"lr": [None, 2e-3], "seed": [42, 7], "log_to": [[], ["wandb"]]}
    assert document["notes"] == []
    words = dict((what, texts) for what, *texts in [*comparison.rows(), *comparison.setting_rows()])
    assert words["held-out loss, best"] == ["1.5000 (step 10)", "none"]
    assert words["trainable"] == ["5 (5.00%)", "5 (5.00%)"]
    assert words["--lr"] == ["not set", "0.002"]


def test_an_unfinished_run_is_told_from_its_logs_and_plan(make_run: MakeRun) -> None:
    run = make_run("b", finished=False, steps=8, evals=((5, 2.0),))
    (run / "checkpoints" / "step-5").mkdir(parents=True)
    state = {"fingerprints": {"model": "cc33", "data": "aa11+bb22"}}
    (run / "checkpoints" / "step-5" / "state.json").write_text(json.dumps(state))
    document = Comparison([make_run("a"), run]).document()
    figures = document["runs"][1]
    assert (figures["finished"], figures["steps"], figures["trainable"]) == (False, 8, 7)
    assert (figures["seconds"], figures["tokens_per_s"]) == (pytest.approx(16.0), pytest.approx(50.0))
    assert figures["memory"] == {"planned": 2000, "measured": 900}
    assert document["notes"] == ["b is not finished: its figures are those of its first 8 steps"]


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ("dd44+bb22", "the rows trained on differ: training losses are of different rows"),
        ("aa11+none", "the rows held out differ: held-out losses are of different rows"),
    ],
)
def test_other_rows_are_said(make_run: MakeRun, data: str, note: str) -> None:
    comparison = Comparison([make_run("a"), make_run("b", data=data)])
    assert comparison.notes == [note]
    assert any(row[0] in note and row[1] != row[2] for row in comparison.rows())


def test_another_base_and_what_is_not_on_record_are_said(make_run: MakeRun) -> None:
    a, b, c = make_run("a"), make_run("b"), make_run("c", finished=False)
    report = json.loads((b / "report.json").read_text())
    (b / "report.json").write_text(json.dumps({**report, "fingerprints": {"model": "ee", "data": "aa11+bb22"}}))
    notes = " / ".join(Comparison([a, b, c]).notes)
    assert "the base differs: losses are of different models" in notes
    assert "whether c had the same rows held out as the others is not on record" in notes


def test_damaged_lines_are_left_out_and_counted(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b")
    with open(b / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 21, "loss": "high"}\n{"step": 22, "los\n\xff\xfe\n[1]\n')
    (b / "eval.jsonl").write_text('{"step": 10, "loss": null}\n{"step": 20, "loss": 1.0}\n')
    comparison = Comparison([a, b])
    assert comparison.notes == ["b: 3 damaged lines of its logs are left out"]
    assert comparison.runs[1].last_step == 20
    assert comparison.document()["runs"][1]["eval"]["best"] == {"step": 20, "loss": 1.0}
    assert "<svg" in page(comparison)


def test_hostile_files_change_no_figure_to_nonsense(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("<script>alert(1)</script>")
    (b / "report.json").write_text('{"trainable": "many", "memory": [1], "seconds": NaN, "fingerprints": 5}')
    comparison = Comparison([a, b])
    figures = comparison.document()["runs"][1]
    assert (figures["trainable"], figures["seconds"], figures["fingerprints"]) == (7, pytest.approx(40.0), {})
    assert "<script" not in page(comparison)


def test_a_run_that_stopped_early_says_of_how_many_steps(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b")
    (b / "report.json").write_text(json.dumps({**json.loads((b / "report.json").read_text()), "steps_planned": 90}))
    comparison = Comparison([a, b])
    assert comparison.rows()[0] == ("steps", "20", "20 of 90, stopped early")
    assert [run["steps_planned"] for run in comparison.document()["runs"]] == [None, 90]


def test_names_are_paths_where_two_runs_share_one(make_run: MakeRun) -> None:
    folders = [make_run("x/run"), make_run("y/run")]
    assert Comparison(folders).names == [str(folder) for folder in folders]


def test_refusals(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = make_run("a"), make_run("b")
    with pytest.raises(InputError, match="two runs or more are compared, and 1 is given"):
        Comparison([a])
    with pytest.raises(InputError, match="given twice"):
        Comparison([a, tmp_path / "b" / ".." / "a"])
    with pytest.raises(InputError, match="gone does not exist"):
        Comparison([a, tmp_path / "gone"])
    with pytest.raises(InputError, match="is not a run folder"):
        Comparison([a, tmp_path])
    (b / "metrics.jsonl").write_text('{"step": 2, "phase": "select", "loss": null}\n')
    with pytest.raises(InputError, match="b has no metrics") as refused:
        Comparison([a, b])
    assert "have done a step" in refused.value.hint
    (b / "config.yaml").write_text("model: m\nrank: many\n")
    with pytest.raises(StorageError, match=r"settings of run .*b are damaged"):
        Comparison([a, b])


def test_the_page_overlays_the_curves_without_a_script(make_run: MakeRun) -> None:
    made = page(Comparison([make_run("a & b"), make_run("c", lr=2e-3)]))
    assert "<script" not in made and "http" not in made
    assert "a &amp; b" in made and "--lr" in made
    assert re.search(r'<svg[^>]*>(?:(?!</svg>).)*class="line s1"(?:(?!</svg>).)*class="line s2"', made)
    assert made.count('type="radio"') == 4  # linear or logarithmic, of the two losses
