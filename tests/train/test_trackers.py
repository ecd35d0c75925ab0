"""Trackers: found missing before anything is loaded, and given every step where they are there."""

import inspect
from pathlib import Path

import accelerate
import pytest

from qrosa.config import LOGGERS
from qrosa.errors import InputError
from qrosa.train import trackers
from qrosa.train.run import finetune


def test_every_tracker_that_accelerate_knows_can_be_named():
    assert sorted(LOGGERS) == sorted(accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    assert set(trackers.opening("run", "0a1b2c3d", Path("logs"), 0)) == set(LOGGERS)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", LOGGERS)
def test_accelerate_takes_what_a_tracker_is_opened_with(name, step):
    """Bound to the arguments, and no further: that would need an account or a package."""
    kind = accelerate.tracking.LOGGER_TYPE_TO_CLASS[name]
    folder = [Path("logs")] if kind.requires_logging_directory else []
    inspect.signature(kind.__init__).bind(None, "qrosa", *folder, **trackers.opening("r", "id", Path(), step)[name])


def test_ids_have_the_lengths_that_trackers_ask_for():
    opened = trackers.opening("run", "0a1b2c3d", Path("logs"), 0)
    assert len(opened["swanlab"]["id"]) == 21 and 32 <= len(opened["comet_ml"]["experiment_key"]) <= 50
    assert opened["comet_ml"]["experiment_key"].isalnum()
    other = trackers.opening("run", "0a1b2c3e", Path("logs"), 0)
    assert other["swanlab"]["id"] != opened["swanlab"]["id"] and other["comet_ml"] != opened["comet_ml"]


def test_what_accelerate_passes_over_is_refused(monkeypatch):
    monkeypatch.setattr("qrosa.train.trackers.importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(InputError, match="accelerate does not take the aim that is installed") as refused:
        trackers.check_trackers(["aim"])
    assert "aim<4" in refused.value.hint


def test_an_unknown_name_is_refused_with_the_list(config):
    with pytest.raises(InputError, match="'neptune' is unknown") as refused:
        config(log_to="tensorboard,neptune")
    assert all(name in refused.value.hint for name in LOGGERS)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr("qrosa.train.trackers.importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"--log-to {name} needs the package {name.replace('_', '-')}"):
        trackers.check_trackers([name])


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


@pytest.mark.parametrize("name", ["comet_ml", "aim"])
def test_a_tracker_that_takes_no_name_is_named_once_it_is_open(name, tmp_path):
    class Writer:
        name = None

        def set_name(self, name):
            self.name = name

    class Open:
        def __init__(self):
            self.name, self.tracker = name, Writer()

    class Accelerator:
        log_with, trackers = [accelerate.utils.LoggerType(name)], [Open()]

        def init_trackers(self, project, config, init_kwargs):
            assert (tmp_path / "logs").is_dir() == (name == "aim")  # Aim's store wants its folder

    accelerator = Accelerator()
    trackers.Trackers(accelerator, tmp_path).on_start({"lr": 1.0}, 0)
    assert accelerator.trackers[0].tracker.name.startswith(tmp_path.name)


def test_a_tracker_that_cannot_be_opened_is_an_error_and_not_a_bug(config, monkeypatch):
    def init_trackers(self, *_, **__):
        raise RuntimeError("no login\nand more")

    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(
        "qrosa.train.run.make_accelerator", lambda names, folder, timeout: accelerate.Accelerator(log_with=Memory())
    )
    monkeypatch.setattr(accelerate.Accelerator, "log_with", ["memory"], raising=False)
    with pytest.raises(InputError, match=r"a tracker of --log-to \(.*\) cannot be opened: no login$"):
        finetune(config(max_steps=3))
