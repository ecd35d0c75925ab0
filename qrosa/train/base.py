"""The 4-bit base that a run trains on.

    --base-rounding nearest   rounded to nearest while it is loaded (the default)
    --base-rounding feedback  made before the run by error feedback, calibrated on the training rows; kept in RUN/base
    --base FOLDER             made before, by ``qrosa quantize``, of the same 16-bit model

The 16-bit model stays what --model names: the sparse part starts at what the base lost against it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qrosa.base.base_files import BaseFiles
from qrosa.base.load import base_info
from qrosa.base.open import open_base
from qrosa.calibrate.folder import REPORT_FILE
from qrosa.calibrate.quantize import quantize
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.errors import InputError
from qrosa.files import read_json, write_fault
from qrosa.record.folder import BASE_FOLDER

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from qrosa.config import RunConfig
    from qrosa.data.encode import EncodedRow
    from qrosa.train.callbacks import Callback


def given_base(folder: str, original: BaseFiles) -> BaseFiles:
    """Open the base that --base names.

    Raises:
        InputError: It is not in 4 bits, was not made of this model, or was made for a repair beside it.
    """
    base_files = open_base(folder)
    if base_files.kind != "nf4":
        raise InputError(f"--base {folder} is not in 4 bits", "give what 'qrosa quantize' made, or leave --base out")
    report = Path(folder).expanduser() / REPORT_FILE
    made = read_json(report) if report.is_file() else {}
    if made.get("base") != original.fingerprint():
        raise InputError(
            f"--base {folder} was not made of {original.source} by 'qrosa quantize'",
            "give the model that it was made of as --model, or the 4-bit model itself as --model without --base",
        )
    settings = made.get("settings", {})
    if settings.get("density") or settings.get("rank"):
        raise InputError(
            f"--base {folder} was made for the repair beside it, which a run does not take over",
            "quantise again without --density and --rank: the run has a sparse and a low-rank part of its own",
        )
    return base_files


def feedback_base(
    config: RunConfig, rows: Iterable[EncodedRow], accelerator: Accelerator, callback: Callback
) -> BaseFiles:
    """Make the run's own base of its training rows, or find the one that a resumed run has; the main process works.

    Raises:
        InputError: The model is in 4 bits already, or the rows are too few.
        StorageError: The base cannot be read or written.
    """
    home = Path(config.output) / BASE_FOLDER
    if home.is_dir() and (Path(config.output) / "checkpoints").is_dir():
        return open_base(str(home))
    apart = _beside(config.output)
    if accelerator.is_main_process:
        settings = QuantizeConfig(config.model, str(apart), seed=config.train.seed)
        tokens = [row.input_ids for row in rows]
        quantize(settings, tokens, device=accelerator.device, force=True, stage=callback.on_phase)
    accelerator.wait_for_everyone()
    return open_base(str(apart))


def take_home(output: str) -> None:
    """Move a base that was made for this run into its folder, once there is one."""
    apart, home = _beside(output), Path(output) / BASE_FOLDER
    if not apart.is_dir():
        return
    try:
        if home.is_dir():
            shutil.rmtree(home)
        os.replace(apart, home)
    except OSError as error:
        raise write_fault(home, error) from None


def name_home(output: str, model: nn.Module) -> None:
    """Have the model's adapter name the base where the run keeps it."""
    home = Path(output) / BASE_FOLDER
    model.qrosa_base = dataclasses.replace(base_info(model), source=str(home))  # type: ignore[assignment]


def _beside(output: str) -> Path:
    """Where the base lies until there is a run folder: nothing is put into one before all was looked at."""
    return Path(output).absolute().with_name(f"{Path(output).absolute().name}.base")
