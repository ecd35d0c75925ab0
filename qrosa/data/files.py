"""Records out of one file: one at a time, each with the place it stands at.

Every reader yields ``(fields, where)``: the record as a plain dict, and a name for its place that a person can go
to (``train.jsonl:12``; ``train.parquet, row 12`` where the format has no lines). Large files are streamed: a line
of JSON Lines, a record of CSV, a batch of Parquet at a time; only plain ``.json`` and ``.txt`` must be read whole.
Nothing here knows what a row means; :mod:`qrosa.data.formats` does.

A fault in the content is an :class:`InputError` that names its place; a fault of the disk or of permissions is a
:class:`StorageError`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from qrosa.data.compressed import PACKED_SUFFIXES, open_bytes, plain_name, reading
from qrosa.data.notes import Notes
from qrosa.data.tables import Record, read_arrow, read_parquet
from qrosa.errors import InputError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")  # these may be packed: .jsonl.gz
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")


def suffix_of(path: Path) -> str | None:
    """Which of :data:`SUFFIXES` a file has, its packing aside; None for files that hold no rows."""
    suffix = PurePath(plain_name(path)).suffix.lower()
    packed = path.suffix.lower() in PACKED_SUFFIXES
    return suffix if suffix in (TEXT_SUFFIXES if packed else SUFFIXES) else None


def read_file(path: Path, columns: Collection[str], notes: Notes) -> Iterator[Record]:
    """Records of one file, by its suffix.

    Args:
        path: The file.
        columns: Names worth reading; files of columns are read without the others, which are noted.
        notes: Takes what is passed over.

    Raises:
        InputError: No known format, or a malformed file.
        StorageError: The file cannot be read.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path} is of no known format", f"use a {listed(SUFFIXES)} file; .gz and .zst are unpacked")
    if suffix == ".parquet":
        yield from read_parquet(path, columns, notes)
    elif suffix == ".arrow":
        yield from read_arrow(path, columns, notes)
    else:
        with reading(path), open_bytes(path) as file:
            yield from _read_text(path, file, suffix)


def _read_text(path: Path, file: BinaryIO, suffix: str) -> Iterator[Record]:
    if suffix in (".csv", ".tsv"):
        yield from _read_csv(path, file, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        yield from _read_json(path, file)
    elif suffix == ".txt":
        text = _decode(file.read().removeprefix(b"\xef\xbb\xbf"), str(path))
        yield {"text": text}, str(path)
    else:
        yield from _read_json_lines(path, file)


def _decode(line: bytes, where: str) -> str:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{where} is UTF-16 text", "save it as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = line[error.start]
        raise InputError(f"{where}: byte 0x{wrong:02x} is not valid UTF-8", "save the file as UTF-8") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{where}: not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(message, "write one complete JSON object a row") from None
    except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
        raise InputError(f"{where}: not readable JSON: {error}", "write one plain JSON object a row") from None


def _as_record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: a row is {describe_type(value)}, not an object", 'write rows as {"key": "value", ...}'
        )
    return value, where


def _read_json_lines(path: Path, file: BinaryIO) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        text = _decode(line, where).strip()
        if text:
            yield _as_record(_parse_json(text, where), where)


def _read_json(path: Path, file: BinaryIO) -> Iterator[Record]:
    """A list of rows, ``{"data": [rows]}``, or JSON Lines under the name of JSON, as many tools write it."""
    text = _decode(file.read().removeprefix(b"\xef\xbb\xbf"), str(path))
    if not text.strip():
        return
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            file.seek(0)
            yield from _read_json_lines(path, file)
            return
        message = f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(message, 'write a list of rows, or {"data": [...]}') from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON: {error}", "write a list of plain rows") from None
    rows = loaded["data"] if isinstance(loaded, dict) and "data" in loaded else loaded
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise InputError(f"{path} holds {describe_type(rows)}, not rows", 'write a list of rows, or {"data": [...]}')
    for number, row in enumerate(rows, start=1):
        yield _as_record(row, f"{path}, row {number}")


def _read_csv(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is shorter than a long document
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
        raise InputError(f"{path} is UTF-16 text", "save it as UTF-8")
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    start = 1
    try:
        header = next(reader, [])
        _check_header(path, header)
        while True:
            start = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                message = f"{path}:{start}: {len(cells)} cells, but the header names {len(header)} columns"
                raise InputError(message, f"put cells that hold {delimiter!r}, quotes or line ends into double quotes")
            yield dict(zip(header, cells, strict=True)), f"{path}:{start}"
    except csv.Error as error:
        raise InputError(f"{path}:{start}: not valid CSV: {error}", "check the double quotes of this row") from None
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        message = f"{path}, near line {start}: byte 0x{wrong:02x} is not valid UTF-8"
        raise InputError(message, "save the file as UTF-8") from None


def _check_header(path: Path, header: list[str]) -> None:
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise InputError(f"{path}:1: column {doubled[0]!r} stands twice in the header", "give each column its own name")


def describe_type(value: Any) -> str:
    """The type of a value in a person's words, for messages."""
    if value is None:
        return "null"
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def listed(names: Collection[str]) -> str:
    """``a, b or c``."""
    *most, last = names
    return f"{', '.join(most)} or {last}"
