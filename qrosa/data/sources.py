"""Where rows come from: a file, a folder or a hub data set, and the share of its rows that is taken.

``rows.jsonl=0.3`` takes 30% of the rows: exactly that many, drawn at random by seed within each block of rows as it is
read, so that no data set has to be counted before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrosa.data.files import SUFFIXES, listed, read_file, suffix_of
from qrosa.data.folder import split_files
from qrosa.data.notes import Notes
from qrosa.data.tables import Record, read_hub
from qrosa.errors import InputError
from qrosa.quantities import parse_share

_SHARE = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*%?", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?(:[A-Za-z0-9_.-]+)?")


@dataclass(frozen=True)
class Source:
    """A place of rows and the share of them to take.

    Attributes:
        name: Path of a file or folder, or an id of the Hugging Face hub, with ``:config`` behind it where the data set
            has several configurations.
        share: Above 0 and up to 1.
    """

    name: str
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """``rows.jsonl``, ``rows.jsonl=0.3`` or ``rows.jsonl=30%``.

        Raises:
            InputError: The share is no share above zero.
        """
        name, _, share = text.rpartition("=")
        if not name or not _SHARE.fullmatch(share) or Path(text).expanduser().exists():
            return cls(text)
        value = parse_share(share, f"the share of --data {text}")
        if value <= 0:
            raise InputError(f"--data {text} takes no rows", "use a share above 0, or leave the file out")
        return cls(name, value)


def read_records(
    source: str | Path,
    *,
    split: str | Sequence[str],
    columns: Collection[str],
    notes: Notes | None = None,
    files: list[str] | None = None,
) -> Iterator[Record]:
    """Records of a file, of a folder's files for one split, or of a ``datasets`` id.

    Args:
        source: See :class:`Source`; without a share.
        split: ``train``, ``validation`` or ``test``, or several, of which the first that is there is read. A single
            file holds one split, so it is read whatever this says.
        columns: Names worth reading; files of columns are read without the others.
        notes: Takes what is passed over.
        files: Takes the names of what is read.

    Raises:
        InputError: Nothing stands at ``source``, or what stands there is malformed.
        StorageError: A file cannot be read.
    """
    notes, files = Notes() if notes is None else notes, [] if files is None else files
    splits = (split,) if isinstance(split, str) else tuple(split)
    path = Path(source).expanduser()
    if path.is_dir():
        for file in split_files(path, splits, notes).files:
            files.append(str(file))
            yield from read_file(file, columns, notes)
    elif path.exists():
        files.append(str(source))
        yield from read_file(path, columns, notes)
    elif suffix_of(path) is not None or not _HUB_ID.fullmatch(str(source)):
        raise InputError(f"{source} does not exist", f"give a {listed(SUFFIXES)} file, a folder of them, or a hub id")
    else:
        files.append(str(source))
        yield from read_hub(str(source), splits)


class Draw:
    """Takes a share of a stream's rows, block by block, exactly in all and at random within a block.

    Args:
        share: Above 0 and up to 1.
        seed: What the choice depends on, beside the rows' places.
    """

    def __init__(self, share: float, seed: Sequence[int]) -> None:
        self._share = share
        self._seed = list(seed)
        self._seen = self._taken = self._blocks = 0

    def places(self, rows: int) -> list[int]:
        """Which of the next ``rows`` rows are taken, ascending."""
        self._seen += rows
        count = min(rows, round(self._share * self._seen) - self._taken)
        order = np.random.RandomState([*self._seed, self._blocks]).permutation(rows)
        self._taken += count
        self._blocks += 1
        return sorted(int(place) for place in order[:count])
