"""Files opened as bytes, unpacked on the way where their name says that they are packed.

Nothing is unpacked to disk or into memory as a whole: every reader takes the stream as it comes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qrosa.errors import InputError, StorageError

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


def plain_name(path: Path) -> str:
    """The file's name without the suffix that says how it is packed: ``rows.jsonl`` for ``rows.jsonl.gz``."""
    return path.name.removesuffix(path.suffix) if path.suffix.lower() in PACKED_SUFFIXES else path.name


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the disk's faults, and a packed file's damage, into errors that name the file."""
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None and path.suffix.lower() in PACKED_SUFFIXES:  # the unpackers' own, not the disk's
            raise _damaged(path, error) from None
        raise StorageError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None


def open_bytes(path: Path) -> BinaryIO:
    """A stream of the file's bytes, unpacked.

    Raises:
        InputError: ``.zst`` without pyarrow, or text in another encoding or packed under a plain name.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
        return _open_zstandard(path)
    file = path.open("rb")
    try:
        _refuse_packed(path, file.read(4))
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import pyarrow as arrow
    except ImportError:
        raise InputError(f"{path} needs pyarrow to be read", "install pyarrow, or unpack the file first") from None
    return io.BufferedReader(arrow.input_stream(str(path), compression="zstd"))


def _refuse_packed(path: Path, start: bytes) -> None:
    kinds = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz", b"\x28\xb5": ".zst"}
    suffix = kinds.get(start[:2])
    if suffix == ".bz2" and start[2:3] != b"h":
        suffix = None
    if suffix is not None:
        raise InputError(f"{path} is compressed", f"name it {path.name}{suffix}, or unpack it first")
    if start == b"PK\x03\x04":
        raise InputError(f"{path} is compressed (a .zip archive)", "unpack it first")


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path} cannot be unpacked: {reason}", "write or download the file again")
