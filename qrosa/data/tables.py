"""Records out of columns: Parquet, Arrow (what ``datasets`` saves) and data sets of the Hugging Face hub.

A table gives every object of a column the same keys and fills those that a row has not with null. So nulls inside of
objects are padding and are dropped here; the row's own null columns stay, since a row without a value is a fault that
must be named. Only columns worth reading are read; the others are noted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.data.compressed import reading
from qrosa.data.notes import Notes
from qrosa.errors import InputError, install_hint

if TYPE_CHECKING:
    import pyarrow

Record = tuple[dict[str, Any], str]

BATCH_ROWS = 1024


def read_parquet(path: Path, columns: Collection[str], notes: Notes) -> Iterator[Record]:
    """The rows of a Parquet file, a batch at a time."""
    arrow = _arrow(path)
    import pyarrow.parquet as parquet

    with reading(path):
        try:
            with parquet.ParquetFile(path) as file:
                known = _worth_reading(file.schema_arrow.names, columns, file.metadata.num_rows, path, notes)
                batches = file.iter_batches(batch_size=BATCH_ROWS, columns=known)
                yield from _rows(batches, str(path))
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise _unsound(path, "Parquet", error) from None


def read_arrow(path: Path, columns: Collection[str], notes: Notes) -> Iterator[Record]:
    """The rows of an Arrow file, stream format (``datasets``) or file format (Feather), memory-mapped."""
    arrow = _arrow(path)
    with reading(path):
        try:
            with arrow.memory_map(str(path)) as source:
                batches = _arrow_batches(source)
                first = next(batches, None)
                if first is None:
                    return
                known = _worth_reading(first.schema.names, columns, None, path, notes)
                yield from _rows((batch.select(known) for batch in _chain(first, batches)), str(path))
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise _unsound(path, "Arrow", error) from None


def read_hub(source: str, splits: Sequence[str]) -> Iterator[Record]:
    """The rows of ``id`` or ``id:configuration``: those of the first of ``splits`` that the data set has."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        message = f"{source} is no file or folder, and the datasets package is not installed"
        raise InputError(message, f"check the path, or {install_hint('data')}") from None
    name, _, config = source.partition(":")
    for split in splits:
        try:
            rows = load_dataset(name, config or None, split=split)
            break
        except (DatasetsError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"{source} is no file or folder here, and no hub data set could be loaded: {reason}"
            raise InputError(
                message, "check the path or the id; a hub id needs the network or a filled cache"
            ) from None
        except (ValueError, KeyError) as error:
            if split == splits[-1]:
                reason = " ".join(str(error).split())
                message = f"data set {source} cannot be read: {reason}"
                raise InputError(message, "name the configuration as id:config; check that the split exists") from None
    for number, row in enumerate(rows, start=1):
        yield {key: _without_nulls(value) for key, value in dict(row).items()}, f"{source}, {split} row {number}"


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path} needs pyarrow to be read", install_hint("data")) from None
    return pyarrow


def _arrow_batches(source: Any) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as arrow

    try:
        reader = arrow.ipc.open_stream(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        file = arrow.ipc.open_file(source)
        yield from (file.get_batch(index) for index in range(file.num_record_batches))
        return
    yield from reader


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _worth_reading(
    names: Sequence[str], columns: Collection[str], rows: int | None, path: Path, notes: Notes
) -> list[str]:
    """The columns to read: those asked for, or all where none of them is here, so that the row's kind can be named."""
    known = [name for name in names if name in columns]
    if not known:
        return list(names)
    for name in names:
        if name not in columns:
            notes.add(f"column {name!r}", "no part of such rows", f"{path}, row 1", count=rows or 1, unit="rows")
    return known


def _rows(batches: Iterator[Any], place: str) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield {key: _without_nulls(value) for key, value in row.items()}, f"{place}, row {number}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _unsound(path: Path, form: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path} is not a sound {form} file: {reason}", "write or download it again")
