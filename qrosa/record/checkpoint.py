"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-12/
        adapter.safetensors, adapter_config.json   the adapter as any run saves it (so it loads on its own, too)
        optimizer.safetensors                      fp32 masters and optimizer states
        state.json                                 step, phase, settings, fingerprints, micro-batches, hashes

No random-number state is stored, because there is none to store: data order is a function of (seed, step) and every
micro-batch seeds its own generator from (seed, step, index). A checkpoint is written into a hidden folder and renamed
when it is whole; one that it takes the place of is moved aside first and deleted last. ``state.json`` is written last
and holds size and SHA-256 of the other files and of itself, so that a checkpoint cut short by a crash or damaged on
disk is recognised, reported and passed over for the one before.

The logs of a run (``metrics.jsonl``, ``eval.jsonl``) grow by appending. Their lengths are part of the state; on
resume they are put back to it, and the steps done since are logged again as they are done again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qrosa.errors import InputError, QrosaError, StorageError
from qrosa.files import (
    document_digest,
    file_digest,
    flush_to_disk,
    put_in_place,
    read_json,
    read_tensors,
    write_fault,
    write_json,
    write_tensors,
)
from qrosa.record.state import RunState
from qrosa.sparse.store import ADAPTER_FILE, CONFIG_FILE

CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FORMAT = 2
FILES = (ADAPTER_FILE, CONFIG_FILE, OPTIMIZER_FILE)
_SEAL = "sha256"  # of state.json without this key

# Settings that may change between the two halves of a run without changing what is computed.
FREE_SETTINGS = frozenset(
    {
        "output",
        "keep",
        "save_every",
        "eval_every",
        "samples",
        "log_to",
        "vram",
        "host_memory",
        "micro_batch",
        "packing",
        "checkpointing",
        "offload",
        "deepspeed",  # states are stored whole, under the same names
        "mask_memory",
        "timeout",
    }
)
PLACES = ("model", "data", "eval_data", "chat_template", "base")


@dataclass(frozen=True)
class Checkpoint:
    """A whole and undamaged checkpoint on disk.

    Attributes:
        folder: Where it lies.
        step: Optimizer steps done.
        run: What the run remembered.
        settings: The run's flat settings.
        fingerprints: Of the run's base and data.
        logs: Bytes of each log.
    """

    folder: Path
    step: int
    run: RunState
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    logs: dict[str, int]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What ``Optimizer.load_state_tensors`` takes."""
        return read_tensors(self.folder / OPTIMIZER_FILE)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step}"


def save_checkpoint(
    run: Path,
    state: RunState,
    *,
    write_adapter: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    logs: Mapping[str, int],
) -> Path:
    """Write one checkpoint and make it visible all at once.

    Args:
        run: The run's folder.
        state: What the run remembers, its step among it.
        write_adapter: Writes ``adapter.safetensors`` and ``adapter_config.json`` into a folder.
        optimizer: ``Optimizer.state_tensors()``.
        settings: The run's flat settings.
        fingerprints: Of the run's base and data.
        logs: Bytes of each log, which are on the disk already.

    Raises:
        StorageError: The disk is full or the folder cannot be written; no half-written checkpoint stays.
    """
    final = step_folder(run, state.step)
    draft = final.parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_adapter(draft)
        write_tensors(draft / OPTIMIZER_FILE, dict(optimizer))
        document = {
            "format": FORMAT,
            "step": state.step,
            "settings": dict(settings),
            "fingerprints": dict(fingerprints),
            "run": state.to_json(),
            "logs": dict(logs),
            "files": {name: file_digest(draft / name) for name in FILES},
        }
        write_json(draft / STATE_FILE, {**document, _SEAL: document_digest(document)})
        aside = _aside(final)
        if final.exists():  # of this step before the masks were picked, or of a run that went on from an older one
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        put_in_place(draft, final)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise write_fault(final, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _aside(final: Path) -> Path:
    """Where a checkpoint waits until its successor is in place."""
    return final.parent / f".{final.name}.old"


def recover(run: Path) -> None:
    """Bring back checkpoints whose successors never came, and delete what was left half-done.

    Raises:
        StorageError: The folder cannot be written.
    """
    folder = run / CHECKPOINTS
    try:
        for left in folder.glob(".step-*"):
            name = re.fullmatch(r"\.(step-[0-9]+)\.(old|tmp)", left.name)
            if name is None or left.is_symlink() or not left.is_dir():
                continue
            if name[2] == "old" and not (folder / name[1]).exists():
                os.replace(left, folder / name[1])
            else:
                shutil.rmtree(left)
        if folder.is_dir():
            flush_to_disk(folder)
    except OSError as error:
        raise write_fault(folder, error) from None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that lie there, newest first, whether sound or not."""
    names = [re.fullmatch(r"step-([0-9]{1,18})", entry.name) for entry in (run / CHECKPOINTS).glob("step-*")]
    return sorted((int(name[1]) for name in names if name and step_folder(run, int(name[1])).is_dir()), reverse=True)


def prune(run: Path, keep: int, spare: int | None = None) -> None:
    """Delete all but the ``keep`` newest checkpoints, and the one of step ``spare``."""
    for step in checkpoint_steps(run)[keep:]:
        if step != spare:
            shutil.rmtree(step_folder(run, step), ignore_errors=True)


def delete_checkpoints(run: Path) -> None:
    """Delete every checkpoint of a run, drafts included, and the folder if nothing else is in it.

    Raises:
        OSError: Something cannot be deleted.
    """
    folder = run / CHECKPOINTS
    for path in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        known = {entry.name.removesuffix(".tmp") for entry in path.iterdir()} if path.is_dir() else {""}
        if re.fullmatch(r"\.?step-[0-9]+(\.old|\.tmp)?", path.name) and known <= {*FILES, STATE_FILE}:
            shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def latest(run: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None where there is none at all; a damaged one is passed over with a notice.

    Raises:
        StorageError: There are checkpoints, and all of them are damaged.
    """
    steps = checkpoint_steps(run)
    for step in steps:
        try:
            return open_checkpoint(run, step)
        except QrosaError as error:
            notice(f"checkpoint step-{step} is damaged and is passed over: {error.message}")
    if steps:
        raise StorageError(
            f"all {len(steps)} checkpoints of {run} are damaged", "start over with --force, or in another --output"
        )
    return None


def is_sound(run: Path, step: int) -> bool:
    """Whether the checkpoint of a step is there, byte for byte as it was written."""
    try:
        return open_checkpoint(run, step).step == step
    except QrosaError:
        return False


def open_checkpoint(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        QrosaError: It is not, byte for byte, what was written there.
    """
    folder = step_folder(run, step)
    path, elsewhere = folder / STATE_FILE, "resume from another checkpoint"
    document = read_json(path)
    seal = document.pop(_SEAL, None)
    if document.get("format") != FORMAT or seal != document_digest(document):
        raise StorageError(f"{path} is not what was written", elsewhere)
    state = RunState.from_json(document.get("run", {}))
    files, logs = document.get("files"), document.get("logs")
    settings, fingerprints = document.get("settings"), document.get("fingerprints")
    if state.step != step or not isinstance(files, dict) or set(files) != set(FILES):
        raise StorageError(f"{path} is incomplete", elsewhere)
    if not all(isinstance(part, dict) for part in (logs, settings, fingerprints)):
        raise StorageError(f"{path} is incomplete", elsewhere)
    assert isinstance(logs, dict) and isinstance(settings, dict) and isinstance(fingerprints, dict)
    if not all(type(size) is int and size >= 0 for size in logs.values()):
        raise StorageError(f"{path} is incomplete", elsewhere)
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise StorageError(f"{folder / name} is missing", elsewhere)
        if file_digest(folder / name) != expected:
            raise StorageError(f"{folder / name} is not what was written", elsewhere)
    return Checkpoint(folder, step, state, settings, fingerprints, logs)


def stored_fingerprints(run: Path) -> dict[str, str]:
    """Fingerprints of a run's base and rows as its newest checkpoint says; empty where it cannot be read."""
    for step in checkpoint_steps(run)[:1]:
        try:
            found = read_json(step_folder(run, step) / STATE_FILE).get("fingerprints")
        except QrosaError:
            return {}
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {}


def check_same_run(checkpoint: Checkpoint, settings: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuse to resume a run whose base, data or settings are not the ones it was started with.

    Args:
        checkpoint: Of the run.
        settings: The flat settings of now (``qrosa.config.to_flat``).
        fingerprints: ``model`` and ``data`` as they are now.

    Raises:
        InputError: Saying which of them changed, from what to what.
    """
    # Where the held-out loss decides when to stop or what to keep, so does when it is measured.
    judged = settings.get("keep_best") or settings.get("stop_after") is not None
    free = FREE_SETTINGS - {"eval_every"} if judged else FREE_SETTINGS
    for name, now in settings.items():  # first: another seed or share held out makes other data
        # The fingerprints speak for the base and the data; where they lie is free.
        before = checkpoint.settings.get(name)
        if name not in free and name not in PLACES and before != now:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} was {_shown(before)} when the run was started and is {_shown(now)} now",
                f"resume with {flag} as it was, or start a new run in another --output",
            )
    words = {"model": "the base", "data": "the data"}
    for name, fingerprint in fingerprints.items():
        if checkpoint.fingerprints.get(name) != fingerprint:
            raise InputError(
                f"{words[name]} has changed since the run was started",
                f"resume with the same {name}, or start a new run in another --output",
            )


def _shown(value: object) -> str:
    """A setting as people write it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
