"""A run that was killed, or stopped, goes on as if it had not been: same losses, same bytes."""

import dataclasses
import signal
from pathlib import Path

import pytest

from qrosa.config import make_run_config
from qrosa.errors import InputError, InterruptedRunError
from qrosa.record.checkpoint import checkpoint_steps
from qrosa.train.run import finetune
from tests.train.conftest import Recorder, losses

FILES = ("adapter.safetensors", "adapter_config.json")


def adapter_bytes(run):
    return [(Path(run) / "adapter" / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_killed_and_resumed_equals_one_go(settings, run_in_process, tmp_path, optimizer):
    values = settings(max_steps=20, save_every=3, warmup_steps=4, dropout=0.1, optimizer=optimizer, eval_split="20%")
    whole = tmp_path / "whole"
    finetune(make_run_config({**values, "output": str(whole)}))

    broken = tmp_path / "broken"
    killed = run_in_process({**values, "output": str(broken)}, kill_at=8)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint_steps(broken) == [6, 4]  # masks are picked after step 4
    assert max(losses(broken)) == 8  # two steps were done that no checkpoint knows of
    finetune(make_run_config({**values, "output": str(broken)}), resume=True)

    assert losses(broken) == losses(whole)
    assert adapter_bytes(broken) == adapter_bytes(whole)
    assert (broken / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()


class Stop(Recorder):
    """Sends this process a signal once a step is reported."""

    def __init__(self, at, number=signal.SIGTERM):
        super().__init__()
        self.at, self.number = at, number

    def on_step(self, record):
        super().on_step(record)
        if record.step == self.at:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("at", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(config, tmp_path, at, number):
    whole = config(max_steps=7, output=str(tmp_path / "whole"))
    finetune(whole)
    broken = config(max_steps=7, output=str(tmp_path / "broken"))
    with pytest.raises(InterruptedRunError, match=f"after step {at}") as stopped:
        finetune(broken, callbacks=[Stop(at, number)])
    assert stopped.value.exit_code == 130
    assert f"--resume --output {broken.output}" in stopped.value.hint
    assert checkpoint_steps(Path(broken.output))[0] == at
    recorder = Recorder()
    report = finetune(broken, resume=True, callbacks=[recorder])
    assert [line.step for line in recorder.steps] == list(range(at + 1, 8))
    assert report["steps"] == 7 and report["resumed_at"] == [at]
    assert losses(broken.output) == losses(whole.output)
    assert adapter_bytes(broken.output) == adapter_bytes(whole.output)
    # The handlers of before are back.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class StopSelecting(Recorder):
    """Sends this process a signal while masks are picked."""

    def __init__(self):
        super().__init__()
        self.samples = []

    def on_phase(self, name, done, total):
        if name == "select":
            self.samples.append((done, total))
            if done == 3:
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_signal_ends_mask_selection_at_the_next_sample(config, tmp_path, warmup):
    changes = {"warmup_steps": warmup, "mask_samples": 8, "save_every": 5, "max_steps": 6}
    whole = config(output=str(tmp_path / "whole"), **changes)
    finetune(whole)
    broken, recorder = config(output=str(tmp_path / "broken"), **changes), StopSelecting()
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM while masks were picked") as stopped:
        finetune(broken, callbacks=[recorder])
    assert stopped.value.exit_code == 130 and f"--resume --output {broken.output}" in stopped.value.hint
    assert recorder.samples[-1] == (3, 8)
    assert checkpoint_steps(Path(broken.output)) == ([2] if warmup else [])
    assert ("checkpoints/step-2" if warmup else "there is no checkpoint yet") in stopped.value.message
    finetune(broken, resume=True)
    assert losses(broken.output) == losses(whole.output)
    assert adapter_bytes(broken.output) == adapter_bytes(whole.output)


def test_a_finished_run_resumes_to_its_end(config):
    finetune(config())
    recorder = Recorder()
    report = finetune(config(), resume=True, callbacks=[recorder])
    assert report["steps"] == 6 and report["resumed_at"] == []
    assert recorder.steps == []


def test_a_damaged_newest_checkpoint_is_passed_over(config, recorder):
    with pytest.raises(InterruptedRunError):
        finetune(config(save_every=2), callbacks=[Stop(5)])
    run = Path(config().output)
    (run / "checkpoints" / "step-5" / "optimizer.safetensors").write_bytes(b"")
    finetune(config(save_every=2), resume=True, callbacks=[recorder])
    assert any("step-5 is damaged" in text for text in recorder.notices)
    assert recorder.steps[0].step == 5
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_a_checkpoint_starts_over(config, recorder):
    class Crash(Exception):
        pass

    class Crashing(Recorder):
        def on_step(self, record):
            if record.step == 2:
                raise Crash

    with pytest.raises(Crash):
        finetune(config(save_every=5), callbacks=[Crashing()])
    finetune(config(save_every=5), resume=True, callbacks=[recorder])
    assert any("no checkpoint yet" in text for text in recorder.notices)
    assert len(losses(config().output)) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-3}, "--lr was 0.005"),
        ({"seed": 1}, "--seed was 42"),
        ({"max_steps": 9}, "--max-steps was 6"),
        ({"budget": "5%"}, "--budget was 4%"),
        ({"optimizer": "adamw8bit"}, "--optimizer was adamw"),
    ],
)
def test_another_runs_settings_are_refused(config, change, words):
    with pytest.raises(InterruptedRunError):
        finetune(config(), callbacks=[Stop(3)])
    with pytest.raises(InputError, match=words):
        finetune(config(**change), resume=True)


def test_other_data_and_another_base_are_refused(config, tiny_rows, tmp_path, tiny_tokenizer):
    from tests.conftest import save_tiny_model

    with pytest.raises(InterruptedRunError):
        finetune(config(), callbacks=[Stop(3)])
    other_rows = str(tiny_rows(count=20, name="other.jsonl"))
    with pytest.raises(InputError, match="the data has changed"):
        finetune(config(data=other_rows), resume=True)
    save_tiny_model("llama", tmp_path / "other", tiny_tokenizer, initializer_range=0.05)
    with pytest.raises(InputError, match="the base has changed"):
        finetune(config(model=str(tmp_path / "other")), resume=True)


def test_settings_that_change_nothing_may_change(config):
    with pytest.raises(InterruptedRunError):
        finetune(config(), callbacks=[Stop(3)])
    free = config(keep=5, save_every=1, eval_every=2, micro_batch="3")
    assert finetune(dataclasses.replace(free), resume=True)["steps"] == 6
