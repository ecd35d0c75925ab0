"""Logging to TensorBoard, Weights & Biases or Trackio, through accelerate, only when asked for.

accelerate drops a tracker whose package is missing without a word; here that is an error before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError
from qrosa.record.folder import LOGS_FOLDER
from qrosa.record.identity import run_id
from qrosa.record.logs import StepRecord
from qrosa.train.callbacks import Callback

if TYPE_CHECKING:
    from accelerate import Accelerator

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that each tracker's package is installed, without importing it.

    Raises:
        InputError: One is missing.
    """
    for name in names:
        packages = _PACKAGES[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise InputError(
                f"--log-to {name} needs the package {packages[0]}, which is not installed",
                f"pip install {packages[0]}, or leave {name} out of --log-to",
            )


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
        self.accelerator.init_trackers(
            "qrosa",
            config=plain,
            init_kwargs={
                "wandb": {"name": name, "id": id, "resume": "allow"},
                "trackio": {"name": f"{name}-{id}", "resume": "allow"},  # it knows runs by name
                # What was logged beyond the checkpoint is logged again.
                "tensorboard": {"purge_step": step + 1} if step else {},
            },
        )

    def on_step(self, record: StepRecord) -> None:
        """Log the step's figures."""
        self.accelerator.log(record.figures(), step=record.step)

    def on_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Log what was measured on the held-out rows."""
        counts = ("rows", "supervised_tokens")
        self.accelerator.log({f"eval_{name}": value for name, value in result.items() if name not in counts}, step=step)
