"""Which files of a folder are read, and why the others are not.

A split is told by the words in a file's name and in those of its folders; folders that ``datasets`` wrote with
``save_to_disk`` name their files themselves. Every file that is left out is noted with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qrosa.data.compressed import plain_name
from qrosa.data.files import SUFFIXES, listed, suffix_of
from qrosa.data.notes import Notes
from qrosa.errors import InputError, StorageError

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# What `datasets` and its hub write beside the data: settings, no rows.
_SETTINGS_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Listing:
    """The files of one split.

    Attributes:
        files: What is read, in order.
        split: The split that they belong to.
    """

    files: list[Path]
    split: str


def split_files(folder: Path, splits: Sequence[str], notes: Notes) -> Listing:
    """The files of a folder for the first of ``splits`` that it has.

    ``train`` takes the files that name no split, when none names ``train``; any split takes all files when none of
    them names a split.

    Args:
        folder: Searched with its subfolders; what is hidden in it is not looked at.
        splits: Wanted splits, ``train``, ``validation`` or ``test``, best first.
        notes: Takes the files that are left out.

    Raises:
        InputError: The folder holds no data files, or none of these splits.
        StorageError: It cannot be read.
    """
    files = _data_files(folder, notes)
    found = {file: _split_of(file.relative_to(folder)) for file in files}
    unnamed = [file for file in files if found[file] is None]
    for split in splits:
        chosen = [file for file in files if found[file] == split]
        if not chosen and (split == "train" or unnamed == files):
            chosen = unnamed
        if chosen:
            for file in files:
                if file not in chosen:
                    notes.add(f"file {file.name}", _reason(found[file], split), str(file), unit="files")
            return Listing(chosen, split)
    names = ", ".join(file.name for file in files[:4])
    wanted = " or ".join(splits)
    raise InputError(f"{folder} holds no {wanted} files (found {names})", f"name one {splits[0]}.jsonl, or give a file")


def _reason(split: str | None, wanted: str) -> str:
    if split is None:
        return f"its name says no split, and other files say {wanted}"
    return f"its name says {split}, and {wanted} is read"


def _data_files(folder: Path, notes: Notes) -> list[Path]:
    """Every file with rows below a folder; the others are noted, but for hidden ones and settings."""
    try:
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error}", "check the folder's permissions") from None
    found = [path for path in found if path.name not in _SETTINGS_FILES]
    files = [path for path in found if suffix_of(path) is not None]
    rows = [path for path in files if suffix_of(path) != ".txt"]
    saved = {folder: _saved_files(folder) for folder in {path.parent for path in rows}}
    chosen = []
    for path in found:
        names = saved.get(path.parent)
        if path not in files:
            notes.add("other files", "of no known format", str(path), unit="files")
        elif path not in rows and rows:
            notes.add("text files", "they stand beside files of rows", str(path), unit="files")
        elif names is not None and path.name not in names:
            notes.add(f"file {path.name}", "state.json does not name it", str(path), unit="files")
        else:
            chosen.append(path)
    if not chosen:
        raise InputError(f"{folder} holds no data files", f"put {listed(SUFFIXES)} files into it")
    return chosen


def _saved_files(folder: Path) -> set[str] | None:
    """The data files that ``save_to_disk`` wrote into a folder; None where it did not write it."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _split_of(relative: Path) -> str | None:
    parts = [*relative.parts[:-1], Path(plain_name(relative)).stem]
    for part in reversed(parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None


def _hidden(relative: Path) -> bool:
    return any(part.startswith((".", "__")) for part in relative.parts)
