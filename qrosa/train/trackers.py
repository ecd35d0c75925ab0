"""Logging to any tracker that accelerate knows, through accelerate, only when asked for.

accelerate drops a tracker whose package is missing without a word; here that is an error before anything is loaded.
Every tracker is given the run's name and, where it takes one, an id that follows from the run folder's, so that a
resumed run goes on where it was. MLflow, Aim and ClearML give out ids of their own: there the second half of a run
stands beside the first, under the same name. What trackers write to files goes into the run folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError, first_line
from qrosa.record.folder import LOGS_FOLDER
from qrosa.record.identity import run_id
from qrosa.record.logs import StepRecord
from qrosa.train.callbacks import Callback

if TYPE_CHECKING:
    from accelerate import Accelerator

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX")}  # of a tracker that is not called like its module
_INSTALLED_AS = {"comet_ml": "comet-ml", "aim": "aim<4"}


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that each tracker's package is installed and that accelerate takes it, without importing it.

    Raises:
        InputError: One is missing, or of a version that accelerate passes over.
    """
    for name in names:
        package = _INSTALLED_AS.get(name, name)
        hint = f"pip install '{package}', or leave {name} out of --log-to"
        if not any(importlib.util.find_spec(module) for module in _MODULES.get(name, (name,))):
            raise InputError(f"--log-to {name} needs the package {package}, which is not installed", hint)
        if name not in _taken_by_accelerate():
            raise InputError(f"--log-to {name}: accelerate does not take the {name} that is installed", hint)


def _taken_by_accelerate() -> list[str]:
    from accelerate.tracking import get_available_trackers

    return [str(tracker) for tracker in get_available_trackers()]


def make_accelerator(names: Sequence[str], folder: Path, timeout: float) -> Accelerator:
    """The processes and the device of a run, with its trackers.

    Args:
        names: Trackers to log to.
        folder: The run folder; TensorBoard writes below it.
        timeout: Seconds that a process waits for the others before it gives up.

    Raises:
        InputError: A launcher started several processes, and they did not find each other.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOGS_FOLDER))
    accelerator = Accelerator(
        # Without it, accelerate takes each of a launcher's processes for the only one where there is no card.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the model is loaded in the dtypes that it computes in: no autocast on top of them
        log_with=list(names) or None,
        project_config=places,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) != accelerator.num_processes:
        raise InputError(
            f"a launcher started {started} processes, and {accelerator.num_processes} of them found each other",
            "start them with torchrun, accelerate launch or deepspeed, or unset WORLD_SIZE",
        )
    return accelerator


class Trackers(Callback):
    """Passes steps and evaluations on to accelerate's trackers, which accelerate closes at the end of a run.

    Args:
        accelerator: Holder of the trackers.
        folder: The run folder, whose name and id a resumed run goes on under.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.folder = folder

    def on_start(self, settings: Mapping[str, Any], step: int) -> None:
        """Open the trackers with the run's settings; without any this does nothing."""
        if not self.accelerator.log_with:
            return
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
        name, id = self.folder.absolute().name, run_id(self.folder)
        logs = self.folder / LOGS_FOLDER
        if "aim" in map(str, self.accelerator.log_with):
            logs.mkdir(exist_ok=True)
        try:
            self.accelerator.init_trackers("qrosa", config=plain, init_kwargs=opening(name, id, logs, step))
        except Exception as error:  # no login, no server, settings of its own: each tracker has errors of its own
            raise InputError(
                f"a tracker of --log-to ({', '.join(map(str, self.accelerator.log_with))}) cannot be opened: "
                f"{first_line(error)}",
                "log in to it or set it up as its own documentation says, or leave it out of --log-to",
            ) from error
        for tracker in self.accelerator.trackers:
            if tracker.name == "comet_ml":
                tracker.tracker.set_name(name)
            elif tracker.name == "aim":
                tracker.tracker.name = f"{name}-{id}"

    def on_step(self, record: StepRecord) -> None:
        """Log the step's figures."""
        self.accelerator.log(record.figures(), step=record.step)

    def on_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Log what was measured on the held-out rows."""
        counts = ("rows", "supervised_tokens")
        self.accelerator.log({f"eval_{name}": value for name, value in result.items() if name not in counts}, step=step)


def opening(name: str, id: str, logs: Path, step: int) -> dict[str, dict[str, Any]]:
    """What each tracker is opened with.

    Args:
        name: The run's.
        id: The run's, 8 hexadecimal digits.
        logs: Folder in the run folder for what trackers write.
        step: Steps done before; not 0 in a run that goes on.

    Returns:
        Tracker -> arguments beside the project's name.
    """
    long = hashlib.sha256(f"qrosa run {id}".encode()).hexdigest()  # for trackers that want ids of a length
    return {
        "wandb": {"name": name, "id": id, "resume": "allow"},
        "trackio": {"name": f"{name}-{id}", "resume": "allow"},  # it knows runs by name
        "tensorboard": {"purge_step": step + 1} if step else {},  # what was logged beyond the checkpoint comes again
        "swanlab": {"experiment_name": name, "id": long[:21], "resume": "allow"},
        "comet_ml": {"experiment_key": long[:40]},
        "dvclive": {"dir": str(logs / "dvclive"), "resume": step > 0, "dvcyaml": None},
        "mlflow": {"run_name": f"{name}-{id}"},
        "aim": {"experiment": f"{name}-{id}"},
        # Else it would empty a task of this name that is younger than a day.
        "clearml": {"task_name": f"{name}-{id}", "reuse_last_task_id": False},
    }
