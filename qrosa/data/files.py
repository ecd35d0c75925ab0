"""Records out of files: one at a time, each with the place it stands at.

Every reader yields ``(fields, where)``: the record as a plain dict, and a name for its place that a person can go
to (``train.jsonl:12``; ``train.parquet, row 12`` where the format has no lines). Large files are streamed: a line
of JSON Lines, a record of CSV, a batch of Parquet at a time; only plain ``.json`` must be read whole. Nothing here
knows what a row means; :mod:`qrosa.data.formats` does.

A fault in the content is an :class:`InputError` that names its place; a fault of the disk or of permissions is a
:class:`StorageError`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qrosa.errors import InputError, StorageError

Record = tuple[dict[str, Any], str]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PARQUET_BATCH = 1024
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# What `datasets` and its hub write beside the data: settings, no rows.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?(:[A-Za-z0-9_.-]+)?")


def read_records(source: str | Path, *, split: str, columns: Collection[str]) -> Iterator[Record]:
    """Records of a file, of a folder's files for one split, or of a ``datasets`` id.

    Args:
        source: Path of a file or folder, or an id of the Hugging Face hub, with ``:config`` behind it where the
            data set has several configurations.
        split: ``train``, ``validation`` or ``test``. A single file holds one split, so it is read whatever this says.
        columns: Names worth reading; Parquet files are read without their other columns.

    Raises:
        InputError: Nothing stands at ``source``, or what stands there is malformed.
        StorageError: A file cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for file in split_files(path, split):
            yield from read_file(file, columns)
    elif path.exists():
        yield from read_file(path, columns)
    elif path.suffix.lower() in SUFFIXES or not _HUB_ID.fullmatch(str(source)):
        raise InputError(f"{source} does not exist", f"give a {_listed(SUFFIXES)} file, a folder of them, or a hub id")
    else:
        yield from _read_hub(str(source), split)


def read_file(path: Path, columns: Collection[str]) -> Iterator[Record]:
    """Records of one file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is of no known format", f"use a {_listed(SUFFIXES)} file")
    if suffix == ".parquet":
        yield from _read_parquet(path, columns)
        return
    with _reading(path), path.open("rb") as file:
        _refuse_other_encodings(path, file)
        if suffix == ".csv":
            yield from _read_csv(path, file)
        elif suffix == ".json":
            yield from _read_json(path, file)
        else:
            yield from _read_json_lines(path, file)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that belong to a split, by the words in their names and in those of their folders.

    ``train`` takes the files that name no split, when none names ``train``; any split takes all files when none of
    them names a split.
    """
    try:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error}", "check the folder's permissions") from None
    files = [p for p in found if p.name not in _NOT_DATA and not _hidden(p.relative_to(folder))]
    if not files:
        raise InputError(f"{folder} holds no data files", f"put {_listed(SUFFIXES)} files into it")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    chosen = [file for file in files if splits[file] == split]
    unnamed = [file for file in files if splits[file] is None]
    if not chosen and (split == "train" or unnamed == files):
        chosen = unnamed
    if not chosen:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(f"{folder} holds no {split} files (found {names})", f"name one {split}.jsonl, or give a file")
    return chosen


def _split_of(relative: Path) -> str | None:
    for part in reversed(relative.with_suffix("").parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None


def _hidden(relative: Path) -> bool:
    return any(part.startswith((".", "__")) for part in relative.parts)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the disk's faults into errors that name the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None


def _refuse_other_encodings(path: Path, file: BinaryIO) -> None:
    start = file.read(4)
    file.seek(0)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path} is UTF-16 text", "save it as UTF-8")
    if start[:2] == b"\x1f\x8b" or start == b"PK\x03\x04":
        raise InputError(f"{path} is compressed", "unpack it first")


def _decode(line: bytes, where: str) -> str:
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


def _read_csv(path: Path, file: BinaryIO) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is shorter than a long document
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
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
                raise InputError(message, "put cells that hold commas, quotes or line ends into double quotes")
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


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow to be read", "pip install 'qrosa[data]'") from None
    number = 0
    with _reading(path):
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                known = [name for name in names if name in columns] or names
                for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=known):
                    for row in batch.to_pylist():
                        number += 1
                        yield row, f"{path}, row {number}"
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not a sound Parquet file: {reason}", "write or download it again") from None


def _read_hub(source: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        message = f"{source} is no file or folder, and the datasets package is not installed"
        raise InputError(message, "check the path, or pip install 'qrosa[data]'") from None
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split)
    except (DatasetsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{source} is no file or folder here, and no hub data set could be loaded: {reason}"
        raise InputError(message, "check the path or the id; a hub id needs the network or a filled cache") from None
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        message = f"data set {source} cannot be read: {reason}"
        raise InputError(message, "name the configuration as id:config; check that the split exists") from None
    for number, row in enumerate(rows, start=1):
        yield dict(row), f"{source}, {split} row {number}"


def describe_type(value: Any) -> str:
    """The type of a value in a person's words, for messages."""
    if value is None:
        return "null"
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _listed(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
