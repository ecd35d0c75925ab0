"""The two logs of a run, a JSON line for each thing that happened, and the record of a step that the first is made of.

``metrics.jsonl`` has a line for each optimizer step and one for the mask selection; ``eval.jsonl`` has one for each
evaluation. Both grow by appending.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.errors import StorageError
from qrosa.files import flush_to_disk, write_fault, write_text

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
LOGS = (METRICS_FILE, EVAL_FILE)


@dataclass(frozen=True)
class StepRecord:
    """One finished optimizer step, or the mask selection: what the log, the terminal and the trackers tell of it.

    Attributes:
        step: Steps done, this one included.
        phase: ``warmup``, ``select`` or ``train``.
        loss: Mean loss per supervised token; None for a selection.
        lr: Learning rate of the low-rank part.
        grad_norm: Gradient norm before clipping; None for a selection.
        tokens: Tokens that were read, padding not counted.
        supervised_tokens: Those of them that carry loss.
        tokens_per_s: Tokens a second.
        memory: Peak bytes of the phase so far.
        total: Steps to do in all.
        planned: Bytes that the plan gives the phase, or None without a plan.
        seconds_left: Estimate for the steps that are left.
    """

    step: int
    phase: str
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    supervised_tokens: int
    tokens_per_s: float
    memory: int
    total: int
    planned: int | None
    seconds_left: float

    def line(self) -> dict[str, Any]:
        """The record as a line of ``metrics.jsonl``: what was measured, without the outlook."""
        return {"step": self.step, "phase": self.phase, **self.figures()}

    def figures(self) -> dict[str, Any]:
        """What was measured."""
        return {
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_s": self.tokens_per_s,
            "memory": self.memory,
        }


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line to a log.

    Raises:
        StorageError: The disk is full or the file cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise write_fault(path, error) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole; what a crash cut short or a disk damaged is left out."""
    return read_log(path)[0]


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log that are whole, and the number of those that are not; none where there is no log."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().decode("utf-8", "replace").splitlines()
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines, len(texts) - len(lines)


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each log of a run, 0 where there is none yet; on the disk itself when this returns."""
    sizes = {}
    for name in LOGS:
        path = folder / name
        if path.exists():
            flush_to_disk(path)
        sizes[name] = path.stat().st_size if path.exists() else 0
    return sizes


def restore(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Put the logs back to what they were at a checkpoint, so that the steps since are logged once.

    A log that is shorter than it was, or gone, costs its lines and nothing else. Each is written anew rather than cut:
    what a folder brought from elsewhere links to stays as it is.

    Args:
        folder: The run folder.
        sizes: Name -> bytes at the checkpoint; other names than the logs' are not looked at.

    Returns:
        What people should know, a sentence each.

    Raises:
        StorageError: A log cannot be read or written.
    """
    notices = []
    for name in LOGS:
        path, size = folder / name, sizes.get(name, 0)
        try:
            there = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}", "check the file's permissions") from None
        if len(there) < size:
            notices.append(f"{name} lost {size - len(there)} of {size} bytes since the checkpoint: its curve has a gap")
        kept = there[:size]
        kept = kept[: kept.rfind(b"\n") + 1]
        if kept:
            write_text(path, kept.decode("utf-8", "replace"))
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_fault(path, error) from None
    return notices
