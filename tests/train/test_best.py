"""Early stopping and the best adapter: by the held-out loss alone, the same after a kill."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from qrosa.base.adapter_io import load_run_or_model
from qrosa.config import TrainConfig, make_run_config
from qrosa.data.batching import Limits
from qrosa.errors import InputError
from qrosa.record.checkpoint import checkpoint_steps
from qrosa.record.state import RunState
from qrosa.train import loop
from qrosa.train.best import kept_step, note_evaluation, out_of_patience
from qrosa.train.run import finetune
from tests.train.conftest import losses

FILES = ("adapter.safetensors", "adapter_config.json")


def adapter_bytes(folder):
    return [(Path(folder) / name).read_bytes() for name in FILES]


@pytest.fixture
def held_out_losses(monkeypatch):
    """``held_out_losses({2: 1.0, 4: 2.0})``: let the evaluations after these steps find these losses."""

    def give(found):
        real = loop.TrainingLoop.evaluate

        def evaluate(self):
            step = self.parts.state.step
            fixed = {"rows": 1, "supervised_tokens": 1, "loss": found[step], "perplexity": 1.0}
            monkeypatch.setattr(loop, "evaluate", lambda *_, **options: (fixed, options["max_tokens"]))
            real(self)

        monkeypatch.setattr(loop.TrainingLoop, "evaluate", evaluate)

    return give


def test_what_counts_as_better():
    train, state = TrainConfig(stop_after=2, keep_best=True), RunState(Limits(1, 1), 1, 1)
    counted = []
    for state.step, loss in enumerate([3.0, 2.0, 2.0, float("nan"), 1.5, 1.6], 1):
        note_evaluation(state, {"loss": loss})
        counted.append((kept_step(train, state), state.since_best, out_of_patience(train, state)))
    assert counted == [(1, 0, False), (2, 0, False), (2, 1, False), (2, 2, True), (5, 0, False), (5, 1, False)]
    assert kept_step(TrainConfig(), state) is None and not out_of_patience(TrainConfig(), state)


def test_a_state_says_whether_its_best_adds_up():
    from qrosa.errors import StorageError

    good = RunState(Limits(1, 1), 1, 1, step=4, best={"step": 2, "loss": 1.0}, since_best=1).to_json()
    assert RunState.from_json(good).best == {"step": 2, "loss": 1.0}
    for change in ({"best": {"step": 5, "loss": 1.0}}, {"best": {"step": 2}}, {"best": []}, {"since_best": -1}):
        with pytest.raises(StorageError, match="does not add up"):
            RunState.from_json({**good, **change})


def test_a_run_stops_and_ends_with_its_best_adapter(config, recorder, held_out_losses):
    held_out_losses({2: 0.1, 4: 1.0, 6: 3.0, 8: 2.0})  # that of step 2 is of the warm-up
    settings = config(max_steps=12, eval_split="25%", eval_every=2, save_every=3, keep=1, stop_after=2, keep_best=True)
    report = finetune(settings, callbacks=[recorder])
    run = Path(settings.output)
    assert (report["steps"], report["steps_planned"], report["stopped_early"]) == (8, 12, True)
    assert (report["adapter_step"], report["eval"]["loss"], report["best"]["step"]) == (4, 1.0, 4)
    assert max(losses(run)) == 8
    assert checkpoint_steps(run) == [8, 4]
    assert adapter_bytes(run / "adapter") == adapter_bytes(run / "checkpoints" / "step-4")
    assert adapter_bytes(run / "adapter") != adapter_bytes(run / "checkpoints" / "step-8")
    stopped = "topped after step 8 of 12: the held-out loss has not come down in 2 evaluations since step 4"
    card, page = (run / "README.md").read_text(), (run / "report.html").read_text()
    assert f"S{stopped}." in card and "The adapter is that of step 4" in card and "loss 1.0000" in card
    assert "4, the best" in page and "8 of 12" in page
    assert any(text == f"s{stopped}" for text in recorder.notices)
    load_run_or_model(str(run))  # a sound adapter


def test_without_keep_best_the_last_adapter_stays(config, held_out_losses):
    held_out_losses({step: float(step) for step in range(2, 13, 2)})
    report = finetune(config(max_steps=12, eval_split="25%", eval_every=2, stop_after=1))
    assert (report["steps"], report["adapter_step"], report["eval"]["loss"]) == (6, 6, 6.0)
    run = Path(config().output)
    assert adapter_bytes(run / "adapter") == adapter_bytes(run / "checkpoints" / "step-6")


def test_the_last_evaluation_can_be_the_best(config, held_out_losses):
    held_out_losses({3: 2.0, 6: 1.5, 7: 1.0})
    report = finetune(config(max_steps=7, eval_split="25%", eval_every=3, keep_best=True, stop_after=9))
    assert (report["adapter_step"], report["stopped_early"], report["eval"]["loss"]) == (7, False, 1.0)


def test_killed_and_resumed_stops_at_the_same_step_with_the_same_adapter(settings, tiny_rows, run_in_process, tmp_path):
    """Held-out rows with the answers exchanged: their loss comes down with the words and goes up with their meaning."""
    changes = {"max_steps": 40, "warmup_steps": 2, "save_every": 5, "keep": 1, "lr": 0.1, "sparse_lr": 0.05}
    rows = [json.loads(line) for line in Path(settings()["data"]).read_text().splitlines()]
    other = {" positive": " negative", " negative": " positive"}
    wrong = tiny_rows([{**row, "completion": other[row["completion"]]} for row in rows[:8]], name="wrong.jsonl")
    judged = {"eval_data": str(wrong), "eval_every": 2, "stop_after": 3, "keep_best": True}
    values = settings(**changes, **judged)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    report = finetune(make_run_config({**values, "output": str(whole)}))
    assert report["stopped_early"] and report["adapter_step"] < report["steps"] < 40
    killed = run_in_process({**values, "output": str(broken)}, kill_at=report["steps"] - 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = finetune(make_run_config({**values, "output": str(broken)}), resume=True)
    assert (again["steps"], again["best"], again["since_best"]) == (report["steps"], report["best"], 3)
    assert losses(broken) == losses(whole)
    assert adapter_bytes(broken / "adapter") == adapter_bytes(whole / "adapter")
    assert (broken / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    once_more = finetune(make_run_config({**values, "output": str(broken)}), resume=True)  # it stays stopped
    assert once_more["steps"] == report["steps"]
    assert adapter_bytes(broken / "adapter") == adapter_bytes(whole / "adapter")


def test_a_lost_best_checkpoint_is_said_and_looked_for_anew(config, recorder, held_out_losses):
    held_out_losses({4: 1.0, 6: 2.0, 8: 3.0, 2: 9.0})
    settings = config(max_steps=8, eval_split="25%", eval_every=2, keep=1, keep_best=True)
    finetune(settings)
    run = Path(settings.output)
    shutil.rmtree(run / "checkpoints" / "step-4")
    report = finetune(settings, resume=True, callbacks=[recorder])
    assert any("step-4, is gone or damaged" in text for text in recorder.notices)
    assert (report["steps"], report["adapter_step"], report["best"]) == (8, 8, {})


@pytest.mark.parametrize(("name", "value"), [("stop_after", 2), ("keep_best", True)])
def test_held_out_rows_are_needed_and_how_often_they_are_read_is_fixed(config, name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} reads held-out rows, and none are held out") as refused:
        finetune(config(**{name: value}))
    assert "--eval-split 5%" in refused.value.hint
    assert not Path(config().output).exists()
    report = finetune(config(eval_split="25%", **{name: value}))
    assert report["steps"] <= 6
    lines = (Path(config().output) / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(
        range(1, report["steps"] + 1)
    )  # a twentieth, at least 1
    with pytest.raises(InputError, match="--eval-every was 1 when the run was started and is 2 now"):
        finetune(config(eval_split="25%", eval_every=2, **{name: value}), resume=True)
