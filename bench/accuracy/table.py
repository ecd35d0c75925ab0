"""The table of finished runs: a CSV that is only ever appended to, by any number of processes.

A row is written in one piece under a lock. What a process works on it holds a lock file for, which the system lets
go of when the process ends, however it does: nobody else takes that run meanwhile, and a run broken off is free again.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "stage", "task", "method", "seed", "split", "score", "loss", "exact", "rows", "trainable", "steps", "train_tokens",
    "seconds", "tokens_per_s", "peak_bytes", "commit", "key", "values",
)  # fmt: skip


class Table:
    """A CSV of finished runs.

    Args:
        path: The file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, str]]:
        """All rows, in the order in which they were finished."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def keys(self) -> set[str]:
        """The keys of all rows."""
        return {row["key"] for row in self.rows()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished run.

        Raises:
            ValueError: A column is unknown.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        with open(self.path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_size:  # asked under the lock
                writer.writeheader()
            writer.writerow(dict(row))
            os.write(file.fileno(), text.getvalue().encode())

    @contextlib.contextmanager
    def claim(self, key: str, folder: Path) -> Iterator[bool]:
        """Hold a run for as long as the block lasts; False where another process holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{self.path.resolve()} {key}".encode()).hexdigest()[:24]
        with open(folder / f"{name}.lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def packed(values: tuple[float, ...]) -> str:
    """Scores of rows as a digit each, 0 to 9 for 0 to 1: exact for right and wrong."""
    return "".join(str(round(9 * value)) for value in values)


def unpacked(digits: str) -> list[float]:
    """The scores again, to a ninth."""
    return [int(digit) / 9 for digit in digits]
