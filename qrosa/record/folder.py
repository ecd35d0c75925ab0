"""The run folder: what lies in it, when it may be made, and its two growing logs.

    config.yaml plan.json metrics.jsonl eval.jsonl checkpoints/ adapter/ report.json report.html README.md
    [base/] [logs/]

Nothing is created before everything that can be refused has been looked at, so a bad input leaves no folder behind.
``--force`` deletes the files of a former run and no others: a mistyped ``--output ~`` must not cost a home folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qrosa.errors import InputError, StorageError
from qrosa.files import write_fault
from qrosa.quantities import bytes_text

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base"  # a 4-bit base that was made for the run
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
CARD_FILE = "README.md"
LOGS_FOLDER = "logs"
OWN_NAMES = (
    CONFIG_FILE,
    PLAN_FILE,
    METRICS_FILE,
    EVAL_FILE,
    "checkpoints",
    ADAPTER_FOLDER,
    BASE_FOLDER,
    REPORT_JSON,
    REPORT_HTML,
    CARD_FILE,
    LOGS_FOLDER,
)


def check_output(output: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output that a run cannot or must not be written to; changes nothing on disk.

    Raises:
        InputError: It exists and is not empty, or there is nothing to resume.
        StorageError: It cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file", "give a folder as --output")
    is_run = (output / CONFIG_FILE).is_file()
    if resume and not is_run:
        raise InputError(f"there is no run to resume in {output}", "check --output, or leave --resume out")
    if not resume and output.is_dir() and any(output.iterdir()):
        if not force:
            hint = "--resume goes on with it, --force starts over" if is_run else "give another --output"
            raise InputError(f"output {output} exists and is not empty", hint)
        if not is_run:
            raise InputError(
                f"output {output} is not empty and is no run", "--force overwrites runs only; give another --output"
            )
    nearest = output.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"output {output} lies below a file, {nearest}", "give another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"output {output} cannot be written", f"check the permissions of {nearest}")


def check_room(
    output: Path, nbytes: int, hint: str = "free some disk, lower --keep, or give an --output on another disk"
) -> None:
    """Refuse a run that the disk has no room for: its checkpoints and adapter, or what it offloads.

    Raises:
        StorageError: Less than ``nbytes`` are free where ``output`` will be.
    """
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if nbytes > free:
        raise StorageError(
            f"the run takes {bytes_text(nbytes)} and {bytes_text(free)} is free in {nearest}",
            hint,
        )


def make_folder(output: Path, *, force: bool) -> None:
    """Create the run folder; with ``force`` the files of a former run in it are deleted first.

    Raises:
        StorageError: It cannot be created or cleared.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in OWN_NAMES if force else ():
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise write_fault(output, error) from None


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line to a log.

    Raises:
        StorageError: The disk is full or the file cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise write_fault(path, error) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def size_of(path: Path) -> int:
    """Bytes of a log, 0 where there is none yet."""
    return path.stat().st_size if path.exists() else 0
