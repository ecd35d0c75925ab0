"""Logging to TensorBoard, Weights & Biases or Trackio, through accelerate, only when asked for.

accelerate drops a tracker whose package is missing without a word; here that is an error before anything is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError
from qrosa.record.folder import LOGS_FOLDER

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


def make_accelerator(names: Sequence[str], folder: Path) -> Accelerator:
    """The processes and the device of a run, with its trackers.

    Args:
        names: Trackers to log to.
        folder: The run folder; TensorBoard writes below it.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOGS_FOLDER))
    # The model is loaded in the dtypes that it computes in: no autocast on top of them.
    return Accelerator(mixed_precision="no", log_with=list(names) or None, project_config=places)


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Open the trackers with the run's settings; without any this does nothing."""
    if accelerator.log_with:
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
        accelerator.init_trackers("qrosa", config=plain)
