"""Encoded rows in a file without a name: a data set larger than memory trains, and a crash leaves nothing behind.

A row is a record of int32 numbers: a head, the ranges that carry loss, the token ids, and its place as text. Records
lie back to back in a temporary file that is removed from its folder as soon as it is open. In memory stay some 30 bytes
a row: where it begins, how long it is, how many tokens carry loss. A step reads its few rows with ``pread``: the kernel
keeps what is read often in its page cache and drops it when memory is short. Mapping the file would do the same, but
would count its pages as this process's own, and turn a fault of the disk into a signal instead of an error.

Written out and read back rows are equal, so training on them is the same, bit for bit, as on rows in memory.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast, overload

import numpy as np

from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.errors import StorageError
from qrosa.files import cache_folder

_HEAD = 9  # ids, ranges, truncated, skipped turns, wanted, prompt_len, answer_end, turn_end, bytes of the place
_NONE = -1
_BUFFER = 2**20


class RowWriter:
    """Takes encoded rows one by one.

    Raises:
        StorageError: No file can be made.
    """

    def __init__(self) -> None:
        self._file: BinaryIO = _temporary_file()
        self._starts = array("q", [0])
        self._lengths = array("i")
        self._supervised = array("i")

    def append(self, row: EncodedRow) -> None:
        """Write a row behind those that are there.

        Raises:
            StorageError: The disk is full, or faulty.
        """
        record = _record(row)
        with _writing():
            self._file.write(record)
        self._starts.append(self._starts[-1] + len(record))
        self._lengths.append(len(row.input_ids))
        self._supervised.append(row.supervised_tokens)

    def close(self) -> Rows:
        """All rows, in the order in which they came; none can be added from now on."""
        with _writing():
            self._file.flush()
        lengths, supervised = (np.array(sizes, dtype=np.int32) for sizes in (self._lengths, self._supervised))
        store = RowStore(self._file, np.array(self._starts, dtype=np.int64), lengths, supervised)
        return Rows(store, np.arange(len(lengths), dtype=np.int32))


@dataclass(frozen=True)
class RowStore:
    """Written rows.

    Attributes:
        file: The records.
        starts: Where each begins, int64, and behind the last where it ends.
        lengths: Tokens of each, int32.
        supervised: Tokens of each that carry loss, int32.
    """

    file: BinaryIO
    starts: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def read(self, number: int) -> EncodedRow:
        """One row.

        Raises:
            StorageError: The disk cannot be read.
        """
        start, end = int(self.starts[number]), int(self.starts[number + 1])
        try:
            data = os.pread(self.file.fileno(), end - start, start)
        except OSError as error:
            raise StorageError(f"encoded rows cannot be read back: {error}", "check the drive") from None
        return _row(np.frombuffer(data, dtype="<i4"))


class Rows(Sequence[EncodedRow]):
    """Some rows of a store, in some order; slices are of the same kind and copy nothing.

    Attributes:
        lengths: Tokens of each row, int32.
        supervised: Tokens of each row that carry loss, int32.
    """

    def __init__(self, store: RowStore, numbers: np.ndarray) -> None:
        self._store = store
        self._numbers = numbers
        self.lengths, self.supervised = store.lengths[numbers], store.supervised[numbers]

    @classmethod
    def of(cls, rows: Iterable[EncodedRow]) -> Rows:
        """Rows put into a store of their own."""
        writer = RowWriter()
        for row in rows:
            writer.append(row)
        return writer.close()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | Rows:
        if isinstance(index, slice):
            return Rows(self._store, self._numbers[index])
        return self._store.read(int(self._numbers[index]))

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self._store.read(int(number)) for number in self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def pick(self, places: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these places."""
        return Rows(self._store, self._numbers[np.asarray(places, dtype=np.int64)])


def row_lengths(rows: Sequence[EncodedRow]) -> list[int]:
    """Tokens of each row, without reading them where a store knows."""
    return rows.lengths.tolist() if isinstance(rows, Rows) else [len(row.input_ids) for row in rows]


def with_supervised_tokens(rows: Sequence[EncodedRow]) -> Sequence[EncodedRow]:
    """The rows that carry loss."""
    if isinstance(rows, Rows):
        return rows.pick(np.flatnonzero(rows.supervised))
    return [row for row in rows if row.supervised_tokens]


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"encoded rows cannot be written to {cache_folder()}: {error.strerror or error}"
        raise StorageError(message, "free some room, or name another folder with QROSA_CACHE") from None


def _temporary_file() -> BinaryIO:
    for folder in (cache_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return cast(BinaryIO, tempfile.TemporaryFile(dir=folder, prefix="rows-", buffering=_BUFFER))
        except OSError as error:
            reason = error
    message = f"no file for encoded rows can be made in {cache_folder()}: {reason.strerror or reason}"
    raise StorageError(message, "name a folder that can be written to with QROSA_CACHE")


def _record(row: EncodedRow) -> bytes:
    ids = np.array(row.input_ids, dtype="<i4")
    ranges = _ranges(np.array(row.labels, dtype=np.int64), ids)
    place = row.where.encode("utf-8", "replace")
    given = [_NONE if value is None else value for value in (row.prompt_len, row.answer_end, row.turn_end)]
    marks = (row.truncated, row.skipped_turns, row.wanted)
    head = np.array([len(ids), len(ranges) // 2, *marks, *given, len(place)], dtype="<i4")
    padding = b"\0" * (-len(place) % 4)
    return head.tobytes() + ranges.tobytes() + ids.tobytes() + place + padding


def _ranges(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Starts and ends, in turn, of the runs that carry loss."""
    learnt = np.zeros(len(labels) + 2, dtype=bool)
    learnt[1:-1] = labels != IGNORE
    assert bool((labels == ids)[learnt[1:-1]].all()), "labels are the tokens themselves, or -100"
    return np.flatnonzero(learnt[1:] != learnt[:-1]).astype("<i4")


def _row(record: np.ndarray) -> EncodedRow:
    count, ranges, truncated, skipped, wanted, *given, place_size = record[:_HEAD].tolist()
    edges = record[_HEAD : _HEAD + 2 * ranges].tolist()
    start = _HEAD + 2 * ranges
    ids = record[start : start + count].tolist()
    labels = [IGNORE] * count
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        labels[first:end] = ids[first:end]
    place = record[start + count :].tobytes()[:place_size].decode("utf-8")
    prompt_len, answer_end, turn_end = (None if value == _NONE else value for value in given)
    return EncodedRow(ids, labels, bool(truncated), place, prompt_len, answer_end, turn_end, skipped, bool(wanted))
