"""The run folder: what lies in it, when it may be made, and its two growing logs.

    run.json config.yaml plan.json metrics.jsonl eval.jsonl checkpoints/ adapter/ report.json report.html README.md
    [base/] [logs/] [samples.json]

Nothing is created before everything that can be refused has been looked at, so a bad input leaves no folder behind.
``--force`` deletes what a former run wrote and nothing else: a mistyped ``--output ~`` must not cost a home folder, nor
notes that someone keeps beside a run. Nothing in a folder that came from elsewhere leads out of it: links among a run's
own names are refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qrosa.errors import InputError, StorageError
from qrosa.files import write_fault
from qrosa.quantities import bytes_text
from qrosa.record.checkpoint import CHECKPOINTS, delete_checkpoints
from qrosa.record.identity import RUN_FILE, is_marked, mark
from qrosa.record.lock import LOCK_FILE, RunLock, check_unlocked
from qrosa.record.logs import EVAL_FILE, LOGS, METRICS_FILE
from qrosa.sparse.store import ADAPTER_FILE
from qrosa.sparse.store import CONFIG_FILE as ADAPTER_CONFIG_FILE

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base"  # a 4-bit base that was made for the run
SAMPLES_FILE = "samples.json"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
CARD_FILE = "README.md"
LOGS_FOLDER = "logs"
CARD_MARK = "library_name: qrosa"  # in a model card that a run wrote
OWN_NAMES = (
    RUN_FILE,
    CONFIG_FILE,
    PLAN_FILE,
    METRICS_FILE,
    EVAL_FILE,
    CHECKPOINTS,
    ADAPTER_FOLDER,
    BASE_FOLDER,
    SAMPLES_FILE,
    REPORT_JSON,
    REPORT_HTML,
    CARD_FILE,
    LOGS_FOLDER,
)


def machine_folder(output: Path, machine: int) -> Path:
    """Where a machine keeps a run whose machines step on their own: a run folder each, so that each can stand for all.

    Args:
        output: As the settings name it; the first machine's.
        machine: Index of the machine.
    """
    place = output.absolute()
    return output if machine == 0 else place.with_name(f"{place.name}.machine-{machine}")


def check_output(output: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output that a run cannot or must not be written to; changes nothing on disk.

    Raises:
        InputError: It exists and is not empty, is in use, or there is nothing to resume.
        StorageError: It cannot be written.
    """
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise InputError(f"output {str(output)!r} is not valid text", "give an --output of plain characters") from None
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file", "give a folder as --output")
    check_unlocked(output)
    _check_contents(output, resume=resume, force=force)
    nearest = output.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"output {output} lies below a file, {nearest}", "give another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"output {output} cannot be written", f"check the permissions of {nearest}")


def _check_contents(output: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder by what is in it."""
    is_run = (output / CONFIG_FILE).is_file()
    if resume and not is_run:
        raise InputError(f"there is no run to resume in {output}", "check --output, or leave --resume out")
    if not resume and output.is_dir() and not _is_unused(output):
        if not force:
            hint = "--resume goes on with it, --force starts over" if is_run else "give another --output"
            raise InputError(f"output {output} exists and is not empty", hint)
        if not is_marked(output):
            raise InputError(
                f"output {output} is not empty and is not a qrosa run",
                "--force starts runs over and deletes nothing else; give another --output",
            )
    _refuse_links(output)


def _is_unused(output: Path) -> bool:
    """Whether nothing is there but what a run that was killed before its settings were written leaves behind."""
    left_behind = {LOCK_FILE, RUN_FILE, f"{RUN_FILE}.tmp", f"{CONFIG_FILE}.tmp"}
    return {entry.name for entry in output.iterdir()} <= left_behind


def _refuse_links(output: Path) -> None:
    """Refuse a folder in which a name that a run writes to leads elsewhere."""
    for name in OWN_NAMES:
        paths = [output / name]
        for folder, folders, files in os.walk(output / name):
            paths += [Path(folder) / entry for entry in (*folders, *files)]
        for path in paths:
            if path.is_symlink():
                raise InputError(f"{path} is a link, and a run writes to it", "replace it by what it links to")


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


def open_folder(output: Path, lock: RunLock, *, fresh: bool, force: bool) -> None:
    """Make or enter the run folder and lock it; a fresh run marks it, and with ``force`` clears it first.

    Raises:
        InputError: Another process has taken it meanwhile.
        StorageError: It cannot be created or cleared.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_fault(output, error) from None
    lock.acquire()
    if not fresh:
        return
    _check_contents(output, resume=False, force=force)
    if force:
        _clear(output)
    mark(output)


def _clear(output: Path) -> None:
    """Delete what a run wrote, down to the file; its settings stay until others take their place."""
    files = [PLAN_FILE, *LOGS, SAMPLES_FILE, REPORT_JSON, REPORT_HTML]
    if is_own_card(output / CARD_FILE):
        files.append(CARD_FILE)
    files += [f"{ADAPTER_FOLDER}/{name}" for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)]
    try:
        for path in (output / name for name in files):
            path.unlink(missing_ok=True)
        for path in output.glob(f"{LOGS_FOLDER}/**/events.out.tfevents.*"):
            path.unlink()
        delete_checkpoints(output)
        if (output / BASE_FOLDER / "config.json").is_file():
            shutil.rmtree(output / BASE_FOLDER)
        for name in (ADAPTER_FOLDER, LOGS_FOLDER):
            _remove_empty(output / name)
    except OSError as error:
        raise write_fault(output, error) from None


def is_own_card(path: Path) -> bool:
    """Whether a model card is not there yet, or is one that a run wrote."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those below it, as far as nothing is in them."""
    for path, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(path):
            os.rmdir(path)
