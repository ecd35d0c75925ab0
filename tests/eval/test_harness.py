"""``qrosa eval --tasks``: lm_eval's tasks on the 4-bit base with its adapter, and the same on a merged folder."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import qrosa
from qrosa.cli.main import cli
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]

ROWS = [{"text": f"Review {index}: the film was {word}.", "label": index % 2} for index, word in enumerate("abcdefgh")]
CHOICES = ("good", "bad")
TASK = """
task: films
dataset_path: json
dataset_kwargs:
  data_files: {test: ROWS}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}} It was"
doc_to_choice: ["good", "bad"]
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    """A folder with one task whose rows lie beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "films.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")))
    return folder


def _run(*args: object) -> Any:
    return CliRunner().invoke(cli, ["eval", *map(str, args)])


def _accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """How often the row's own word is the likelier one, computed by hand."""
    right = 0
    for row in rows:
        sums = []
        for choice in CHOICES:
            known = tokenizer(f"{row['text']} It was")["input_ids"]
            ids = torch.tensor([tokenizer(f"{row['text']} It was {choice}")["input_ids"]])
            with torch.no_grad():
                found = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
            sums.append(float(found.gather(1, ids[0, 1:, None])[len(known) - 1 :].sum()))
        right += int(sums[row["label"]] >= max(sums))
    return right / len(rows)


def test_a_task_is_scored_on_the_model_that_was_trained(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, task_files: Path
) -> None:
    pytest.importorskip("lm_eval", reason="of eval --tasks")
    _, run = make_adapter(tiny_model_dir())
    done = _run(run, "--tasks", "films", "--task-files", task_files, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["tasks"]["films"]
    model, tokenizer = qrosa.load(str(tiny_model_dir()))
    qrosa.load_adapter(model, run)
    assert found["rows"] == len(ROWS)
    assert found["acc"] == _accuracy(model.eval(), tokenizer, ROWS)
    limited = _run(run, "--tasks", "films", "--task-files", task_files, "--limit", 3)
    assert limited.exit_code == 0, limited.output
    words = limited.stdout.split()
    assert words[:4] == ["task", "rows", "metric", "value"] and words[4:7] == ["films", "3", "acc"]
    assert float(words[7]) == pytest.approx(_accuracy(model, tokenizer, ROWS[:3]), abs=1e-4)


def test_what_the_harness_cannot_do_is_said_in_two_lines(tiny_model_dir: Callable[..., Path], task_files: Path) -> None:
    pytest.importorskip("lm_eval", reason="of eval --tasks")
    (task_files / "rows.jsonl").unlink()
    for arguments, said in (
        (("--tasks", "no-such-task"), "error: lm_eval knows no task 'no-such-task'"),
        (("--tasks", "films", "--task-files", task_files), "error: the rows of films cannot be loaded:"),
        (("--tasks", "films", "--task-files", task_files / "none"), "is no folder"),
    ):
        done = _run(tiny_model_dir(), *arguments)
        assert done.exit_code == 2 and said in done.stderr and "hint:" in done.stderr, done.stderr


def test_the_example_scores_a_merged_folder(
    tiny_model_dir: Callable[..., Path],
    make_adapter: MakeAdapter,
    task_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="the example is of lm_eval")
    _, run = make_adapter(tiny_model_dir())
    qrosa.merge(run, tmp_path / "merged")
    script = str(Path(__file__).parents[2] / "examples" / "lm_eval_harness.py")
    words = [script, str(tmp_path / "merged"), "films", "--task-files", str(task_files), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(script, run_name="__main__")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("films "))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert ast.literal_eval(line.removeprefix("films "))["acc,none"] == _accuracy(model, tokenizer, ROWS)


def test_without_lm_eval(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    done = _run(tiny_model_dir(), "--tasks", "films")
    assert done.exit_code == 2
    assert "error: --tasks needs lm_eval" in done.stderr and "hint: pip install" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "rows.jsonl", "--tasks", "films"), "--data and --tasks contradict each other"),
        (("--data", "rows.jsonl", "--task-files", "tasks"), "--task-files is of --tasks, which is missing"),
        (("--data", "rows.jsonl", "--as-chat"), "--as-chat is of --tasks, which is missing"),
        ((), "--data is missing"),
    ],
)
def test_what_to_score_on_is_one_thing(
    tiny_model_dir: Callable[..., Path], arguments: tuple[str, ...], said: str
) -> None:
    done = _run(tiny_model_dir(), *arguments)
    assert done.exit_code == 2 and said in done.stderr and "hint:" in done.stderr
