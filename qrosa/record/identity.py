"""``run.json``: what marks a folder as a run, and the id by which trackers know it again.

``--force`` deletes nothing in a folder without this mark: a ``config.yaml`` is what any project may have.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from qrosa.errors import QrosaError
from qrosa.files import read_json, write_json

RUN_FILE = "run.json"
_FORMAT = "qrosa-run"


def is_marked(folder: Path) -> bool:
    """Whether a run of this program wrote the folder."""
    try:
        return read_json(folder / RUN_FILE).get("format") == _FORMAT
    except QrosaError:
        return False


def mark(folder: Path) -> None:
    """Mark a folder as a run, under a new id.

    Raises:
        StorageError: It cannot be written.
    """
    write_json(folder / RUN_FILE, {"format": _FORMAT, "version": 1, "id": secrets.token_hex(4)})


def run_id(folder: Path) -> str:
    """The id of a run, 8 hexadecimal digits; a folder whose mark is lost or damaged gets a new one.

    Raises:
        StorageError: A new mark cannot be written.
    """
    try:
        found = read_json(folder / RUN_FILE).get("id")
    except QrosaError:
        found = None
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{8}", found):
        mark(folder)
        return run_id(folder)
    return found
