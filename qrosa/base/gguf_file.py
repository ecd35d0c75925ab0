"""A ``.gguf`` file, opened: metadata and tensors, of one file or of all parts of a split one. Torch-free.

A split model is ``NAME-00001-of-0000N.gguf`` and so on; the metadata is in the first part, tensors are in all. Any part
may be named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qrosa.errors import InputError, StorageError, first_line, install_hint

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_MADE_UP = re.compile(r"rope_(freqs|factors_\w+)\.weight")  # computed from the config as well


@dataclass(frozen=True)
class GGUFFile:
    """An opened model.

    Attributes:
        source: What the user named.
        path: The file with the metadata: the only one, or the first part.
        readers: The ``gguf`` package's reader of each part.
    """

    source: str
    path: Path
    readers: tuple[Any, ...]

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """llama.cpp's name -> the reader's tensor, of all parts."""
        found = {tensor.name: tensor for reader in self.readers for tensor in reader.tensors}
        return {name: tensor for name, tensor in found.items() if not _MADE_UP.fullmatch(name)}

    @cached_property
    def parts(self) -> dict[str, Path]:
        """llama.cpp's name -> the file that the tensor lies in."""
        return {tensor.name: Path(reader.data.filename) for reader in self.readers for tensor in reader.tensors}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        """One metadata value; of a list with an entry a layer, the largest. None when absent."""
        field = self.readers[0].fields.get(key)
        value = None if field is None else field.contents()
        return max(value) if isinstance(value, list) else value

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in row-major order (GGUF lists dimensions innermost first)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))


def open_gguf(source: str, path: Path) -> GGUFFile:
    """Open a ``.gguf`` file and the parts that belong to it.

    Raises:
        InputError: A part is missing, the package that reads it is, or the file is of blocks that it cannot decode.
        StorageError: A file is damaged or cannot be read.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("reading .gguf files needs the gguf package", install_hint("gguf")) from None
    parts = _parts(source, path)
    try:
        file = GGUFFile(source, parts[0], tuple(GGUFReader(part) for part in parts))
        types = {tensor.tensor_type: tensor for tensor in file.tensors.values()}
        _ = file.architecture
    except PermissionError:
        raise StorageError(f"{source} cannot be read", "check the file's permissions") from None
    except Exception as error:  # the reader trusts the file and fails in many ways on a damaged one
        raise StorageError(
            f"{source} is not a sound GGUF file: {first_line(error)}", "download the file again"
        ) from None
    _refuse_undecodable(source, types)
    return file


def _parts(source: str, path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    wanted = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    missing = [part.name for part in wanted if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more parts" if len(missing) > 1 else ""
        raise InputError(f"{source} is one of {len(wanted)} parts, and {missing[0]}{more} is not there", "download all")
    return wanted


def _refuse_undecodable(source: str, types: dict[Any, Any]) -> None:
    import gguf

    for kind, tensor in types.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise InputError(
                f"{source} has blocks of type {kind.name} ({tensor.name}), which the gguf package cannot decode",
                "use a file of another type, such as Q8_0, Q4_K_M or F16",
            ) from None
