"""The safetensors files that make up a model, by transformers' rule, and the tensors that their headers list.

The rule, first match wins: the file that config.json names under ``transformers_weights``; ``model.safetensors``;
the shards of ``model.safetensors.index.json``. Beyond it, with a note: shards that lost their index, and a lone file of
another name. What a folder holds beside them is left out, and named. Torch-free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.errors import InputError, StorageError
from qrosa.files import read_json, read_safetensors_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_NO_MODEL = ("adapter_model.safetensors", "adapter.safetensors", "consolidated.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file.

    Attributes:
        path: The file.
        name: Its name there.
        dtype: As the format names it: ``BF16``, ``F32``, ...
        shape: As stored.
        start: Offset of its first byte in the file.
        size: Its bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def raw(self, offset: int = 0, count: int | None = None) -> bytes:
        """Some of its bytes, or all of them."""
        with open(self.path, "rb") as file:
            file.seek(self.start + offset)
            return file.read(self.size if count is None else min(count, self.size - offset))

    def same_bytes(self, other: StoredTensor) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        step = 1 << 22
        return all(self.raw(place, step) == other.raw(place, step) for place in range(0, self.size, step))


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model.

    Attributes:
        paths: In order; none where the folder holds no weights yet.
        notes: What was decided that a reader may not expect, a sentence each.
    """

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def find_weight_files(source: str, folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files that make up the model in a folder.

    Raises:
        InputError: Weights of another kind: pickles, an adapter, a set of shards with a gap.
        StorageError: A damaged index, or one that points outside the folder.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    named = config.get("transformers_weights")
    if isinstance(named, str):
        chosen, notes = _listed(folder, named), [f"the weights are {named}, which config.json names"]
    elif SINGLE in present:
        chosen, notes = [SINGLE], []
        if (folder / INDEX).is_file():
            notes = [f"{INDEX} is left out: beside it {SINGLE} is the model, as transformers has it"]
    elif (folder / INDEX).is_file():
        chosen, notes = _listed(folder, INDEX), []
    else:
        chosen, notes = _unlisted(source, folder, present)
    others = [name for name in present if name not in chosen]
    if chosen and others:
        notes.append(f"{_some(others)} in the folder: no part of the model, not read")
    return WeightFiles(tuple(folder / name for name in chosen), tuple(notes))


def _listed(folder: Path, name: str) -> list[str]:
    """The file of that name, or the shards that it lists if it is an index."""
    _inside(folder / name, [name])
    if not name.endswith(".index.json"):
        return [name]
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise StorageError(f"{folder / name} has no weight map", "download the file again")
    shards = sorted(set(weight_map.values()))
    _inside(folder / name, shards)
    return shards


def _inside(where: Path, names: list[str]) -> None:
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
        raise StorageError(f"{where} points outside its folder", "do not use this checkpoint")


def _unlisted(source: str, folder: Path, present: list[str]) -> tuple[list[str], list[str]]:
    """Shards without their index, a lone file of another name, or nothing."""
    shards = {name: match for name in present if (match := _SHARD.fullmatch(name))}
    for stem, total in sorted({(match[1], match[3]) for match in shards.values()}):
        wanted = [f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        gaps = [name for name in wanted if name not in shards]
        if gaps:
            raise InputError(f"{source} lacks {_some(gaps)}", "download the missing files, and the index beside them")
        return wanted, [f"{INDEX} is missing: all {len(wanted)} shards of {stem} are read, which transformers refuses"]
    lone = [name for name in present if name not in _NO_MODEL]
    if len(lone) == 1:
        return lone, [f"{lone[0]} is taken for the model; transformers reads {SINGLE} only"]
    if lone:
        raise InputError(
            f"{source} holds {_some(lone)}, and neither {SINGLE} nor {INDEX}", f"rename the model's file to {SINGLE}"
        )
    _refuse_other_kinds(source, folder, present)
    return [], []


def _refuse_other_kinds(source: str, folder: Path, present: list[str]) -> None:
    if "consolidated.safetensors" in present:
        raise InputError(
            f"{source} holds consolidated.safetensors only, whose tensors have other names",
            "take the model in transformers' format (model.safetensors)",
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{source} is an adapter, not a model", "give the model that it was trained on")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(
            f"{source} has no .safetensors files",
            "convert it to safetensors first: pickled weights can run code and are not read",
        )


def read_headers(paths: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Every tensor that the files list, by its stored name.

    Raises:
        InputError: A file is missing.
        StorageError: A file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        header, data = read_safetensors_header(path)
        for name, (dtype, shape, (first, end)) in header.items():
            found[name] = StoredTensor(path, name, dtype, shape, data + first, end - first)
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
