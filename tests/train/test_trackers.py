"""Trackers: found missing before anything is loaded, and given every step where they are there."""

import accelerate
import pytest

from qrosa.errors import InputError
from qrosa.train import trackers
from qrosa.train.run import finetune


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr("qrosa.train.trackers.importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"--log-to {name} needs the package {name}") as refused:
        trackers.check_trackers([name])
    assert f"pip install {name}" in refused.value.hint


class Memory(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate's own kind that keeps what it is given."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings, self.lines, self.finished = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_settings_steps_and_evaluations(config, monkeypatch):
    from qrosa.train import run

    kept = Memory()
    monkeypatch.setattr(run, "make_accelerator", lambda names, folder, timeout: accelerate.Accelerator(log_with=kept))
    finetune(config(max_steps=4, eval_split="20%", eval_every=2))
    assert kept.settings["budget"] == "4%"
    assert all(isinstance(value, (int, float, str, bool)) for value in kept.settings.values())
    losses = [(step, values["loss"]) for step, values in kept.lines if "loss" in values]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [step for step, values in kept.lines if "eval_loss" in values] == [2, 4]
    assert kept.finished


def test_a_resumed_run_goes_on_under_its_name_and_id(config, monkeypatch):
    """wandb knows a run by its id, trackio by its name; TensorBoard drops what is logged again."""
    opened = []

    def init_trackers(self, project, config, init_kwargs):
        opened.append(init_kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(accelerate.Accelerator, "log_with", ["memory"], raising=False)
    monkeypatch.setattr(
        "qrosa.train.run.make_accelerator", lambda names, folder, timeout: accelerate.Accelerator(log_with=Memory())
    )
    finetune(config(max_steps=3))
    finetune(config(max_steps=3), resume=True)
    finetune(config(max_steps=3), force=True)
    first, resumed, anew = opened
    assert first["wandb"] == resumed["wandb"] and first["trackio"] == resumed["trackio"]
    assert first["wandb"]["name"] == "run" and first["wandb"]["resume"] == "allow"
    assert first["wandb"]["id"] in first["trackio"]["name"]
    assert anew["wandb"]["id"] != first["wandb"]["id"]
    assert resumed["tensorboard"] == {"purge_step": 4} and first["tensorboard"] == {}
