"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-12/
        adapter.safetensors, adapter_config.json   the adapter as any run saves it (so it loads on its own, too)
        optimizer.safetensors                      fp32 masters and optimizer states
        state.json                                 step, phase, settings, fingerprints, micro-batches, hashes

No random-number state is stored, because there is none to store: data order is a function of (seed, step) and every
micro-batch seeds its own generator from (seed, step, index). A checkpoint is written into a hidden folder and renamed
when it is whole; ``state.json`` is written last and holds size and SHA-256 of the other files, so that a checkpoint
cut short by a crash or damaged on disk is recognised, reported and passed over for the one before.

The logs of a run (``metrics.jsonl``, ``eval.jsonl``) grow by appending. Their lengths are part of the state; on
resume they are cut back to it, and the steps done since are logged again as they are done again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qrosa.errors import InputError, QrosaError, StorageError
from qrosa.files import read_json, read_tensors, write_fault, write_json, write_tensors
from qrosa.sparse.store import ADAPTER_FILE, CONFIG_FILE

CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_FILES = (ADAPTER_FILE, CONFIG_FILE, OPTIMIZER_FILE)

# Settings that may change between the two halves of a run without changing what is computed.
FREE_SETTINGS = frozenset(
    {
        "output",
        "keep",
        "save_every",
        "eval_every",
        "log_to",
        "vram",
        "host_memory",
        "micro_batch",
        "checkpointing",
        "offload",
        "deepspeed",  # states are stored whole, under the same names
        "mask_memory",
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole and undamaged checkpoint on disk."""

    folder: Path
    step: int
    state: dict[str, Any]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What ``Optimizer.load_state_tensors`` takes."""
        return read_tensors(self.folder / OPTIMIZER_FILE)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step}"


def save_checkpoint(
    run: Path,
    step: int,
    *,
    write_adapter: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write one checkpoint and make it visible all at once.

    Args:
        run: The run's folder.
        step: Optimizer steps done.
        write_adapter: Writes ``adapter.safetensors`` and ``adapter_config.json`` into a folder.
        optimizer: ``Optimizer.state_tensors()``.
        state: Plain values for ``state.json``.

    Raises:
        StorageError: The disk is full or the folder cannot be written; no half-written checkpoint stays.
    """
    final = step_folder(run, step)
    draft = final.parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_adapter(draft)
        write_tensors(draft / OPTIMIZER_FILE, dict(optimizer))
        files = {name: {"bytes": (draft / name).stat().st_size, "sha256": _sha256(draft / name)} for name in _FILES}
        write_json(draft / STATE_FILE, {"format": 1, **state, "step": step, "files": files})
        for name in (*_FILES, STATE_FILE):
            _flush_to_disk(draft / name)
        if final.exists():  # left by a run that went on from an older checkpoint
            shutil.rmtree(final)
        os.replace(draft, final)
        _flush_to_disk(final.parent)
    except OSError as error:
        raise write_fault(final, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Ask the system to put a file or folder on the disk itself, so that a power cut cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that lie there, newest first, whether sound or not."""
    names = [entry.name for entry in (run / CHECKPOINTS).glob("step-*") if entry.is_dir()]
    return sorted((int(name[5:]) for name in names if name[5:].isdigit()), reverse=True)


def prune(run: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints."""
    for step in checkpoint_steps(run)[keep:]:
        shutil.rmtree(step_folder(run, step), ignore_errors=True)


def latest(run: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None; a damaged one is passed over with a notice."""
    for step in checkpoint_steps(run):
        try:
            return _open(step_folder(run, step), step)
        except QrosaError as error:
            notice(f"checkpoint step-{step} is damaged and is passed over: {error.message}")
    return None


def _open(folder: Path, step: int) -> Checkpoint:
    state = read_json(folder / STATE_FILE)
    files = state.get("files")
    if state.get("step") != step or not isinstance(files, dict) or set(files) != set(_FILES):
        raise StorageError(f"{folder / STATE_FILE} is incomplete", "resume from another checkpoint")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise StorageError(f"{path} is missing", "resume from another checkpoint")
        if path.stat().st_size != expected.get("bytes") or _sha256(path) != expected.get("sha256"):
            raise StorageError(f"{path} is not what was written", "resume from another checkpoint")
    return Checkpoint(folder, step, state)


def check_same_run(state: Mapping[str, Any], settings: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuse to resume a run whose base, data or settings are not the ones it was started with.

    Args:
        state: A checkpoint's ``state.json``, with ``settings`` and ``fingerprints``.
        settings: The flat settings of now (``qrosa.config.to_flat``).
        fingerprints: ``model`` and ``data`` as they are now.

    Raises:
        InputError: Saying which of them changed, from what to what.
    """
    words = {"model": "the base", "data": "the data"}
    for name, fingerprint in fingerprints.items():
        before = state.get("fingerprints", {}).get(name)
        if before != fingerprint:
            raise InputError(
                f"{words[name]} has changed since the run was started",
                f"resume with the same {name}, or start a new run in another --output",
            )
    before_settings = state.get("settings", {})
    for name, now in settings.items():
        # The fingerprints speak for the base and the data; where they lie is free.
        if name in FREE_SETTINGS or name in ("model", "data", "eval_data", "chat_template"):
            continue
        if before_settings.get(name) != now:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} was {_shown(before_settings.get(name))} when the run was started and is {_shown(now)} now",
                f"resume with {flag} as it was, or start a new run in another --output",
            )


def _shown(value: object) -> str:
    """A setting as people write it."""
    if value is None:
        return "not set"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def cut_back(path: Path, size: int) -> None:
    """Cut a log back to the length that it had at a checkpoint; a missing log of length 0 is fine.

    Raises:
        StorageError: The log is shorter than that: it was changed or lost.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise StorageError(f"{path} is shorter than at the checkpoint", "start a new run in another --output")
    if found > size:
        os.truncate(path, size)
