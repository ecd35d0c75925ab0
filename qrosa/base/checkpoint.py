"""A folder of safetensors held against its config.json: the one reader of bases, for planning and for loading.

What can be said from headers is said here, once: which files count, which tensor is which, what is quantised and how,
whether the head is tied, what is missing, of another shape, or left over. Only headers are read, and of a tied head
that is stored all the same its bytes. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qrosa.base.model_config import ModelConfig, read_model_config
from qrosa.base.structure import Structure
from qrosa.base.structure_source import read_structure
from qrosa.base.tensor_names import NF4_STATE, Matching, match_names, split_part, summary
from qrosa.base.weight_files import StoredTensor, find_weight_files, read_headers
from qrosa.errors import InputError, StorageError

_FLOATS = ("BF16", "F16", "F32", "F64")
_16_BIT_HINT = "use the 16-bit checkpoint, or one quantised to NF4 by bitsandbytes"
_MISMATCH_HINT = "the weights and config.json are of different models; download them again"
_STATE_BYTES = 1 << 16  # a quantisation state is a JSON text of some hundred bytes


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked against its config.

    Attributes:
        source: What the user named.
        folder: Where it is.
        config: Its config.
        structure: The model's tensors; the head as it turned out.
        kind: ``dense`` or ``nf4``.
        tensors: Stored tensors by the model's names; none where the folder holds no weights yet.
        packed: Weights in NF4 -> their shape [N, K].
        notes: What was decided that a reader may not expect, a sentence each.
    """

    source: str
    folder: Path
    config: ModelConfig
    structure: Structure
    kind: str
    tensors: Mapping[str, StoredTensor]
    packed: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the model has it."""
        return self.packed.get(name) or self.tensors[name].shape


def open_checkpoint(source: str, folder: Path, *, weights: bool = True) -> Checkpoint:
    """Read a folder's config and headers, and hold them against each other.

    Args:
        source: What the user named.
        folder: The folder.
        weights: They are needed; else a folder where they are still missing is described by its config.

    Raises:
        InputError: A model that cannot be a base, or weights that are not there.
        StorageError: Damaged files, or files of different models.
    """
    config = read_model_config(source, folder)
    kind = quantisation(config, source)
    files = find_weight_files(source, folder, config.whole)
    structure = read_structure(config, source)
    if weights and not files.paths:
        raise InputError(f"{source} has no .safetensors files", "download the model's weights too")
    if not weights and not (files.paths and all(path.is_file() for path in files.paths)):
        return Checkpoint(source, folder, config, structure, kind, {}, {}, config.notes)
    return _held_against(source, folder, config, structure, read_headers(files.paths), files.notes)


def _held_against(
    source: str,
    folder: Path,
    config: ModelConfig,
    structure: Structure,
    stored: Mapping[str, StoredTensor],
    notes: tuple[str, ...],
) -> Checkpoint:
    matching = match_names(stored, structure)
    tensors = {name: stored[theirs] for name, theirs in matching.names.items()}
    packed = {name: _packed_shape(source, name, tensors) for name in _quantised(tensors)}
    kind = "nf4" if packed else "dense"
    if kind == "dense" and quantisation(config, source) == "nf4":
        raise InputError(
            f"the config.json of {source} says 4 bits by bitsandbytes, and its tensors are not quantised",
            "remove quantization_config from config.json if they are right",
        )
    structure, head_notes = _settle_head(source, config, structure, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if _has_place(name, structure)}
    refuse_missing(source, structure.shapes, tensors, matching.extra, head=structure.head)
    for name, shape in (structure.shapes | structure.buffers).items():
        if name in tensors:
            check_shape(source, name, packed.get(name) or tensors[name].shape, shape)
    _refuse_dtypes(source, structure, tensors, packed)
    notes = (*config.notes, *notes, *head_notes, *_leftover(config, matching))
    return Checkpoint(source, folder, config, structure, kind, tensors, packed, notes)


def quantisation(config: ModelConfig, source: str) -> str:
    """What a config says of the weights: ``nf4``, or ``dense`` where it speaks of no quantisation.

    Raises:
        InputError: They are quantised in a way that cannot be trained on.
    """
    settings = config.whole.get("quantization_config", config.text.get("quantization_config"))
    if settings is None:
        return "dense"
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method", "an unknown method")
    four_bits = settings.get("load_in_4bit", settings.get("_load_in_4bit"))
    kind = settings.get("bnb_4bit_quant_type", "nf4")
    if method == "bitsandbytes" and four_bits and kind == "nf4":
        return "nf4"
    words = f"{method} to {kind if four_bits else '8 bits'}" if method == "bitsandbytes" else str(method)
    raise InputError(f"{source} is quantised with {words}, which cannot be a base", _16_BIT_HINT)


def _quantised(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Weights that come with parts of a quantised form."""
    return list(dict.fromkeys(base for base, part in map(split_part, tensors) if part and base in tensors))


def _packed_shape(source: str, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """The [N, K] that bitsandbytes wrote into a weight's quantisation state, a small JSON text stored as a tensor."""
    state = tensors.get(name + NF4_STATE)
    if state is None:
        parts = sorted(part for base, part in map(split_part, tensors) if base == name and part)
        kind = next((part.rpartition("__")[2] for part in parts if "bitsandbytes__" in part), "8 bits")
        raise InputError(
            f"tensor {name!r} of {source} is quantised to {kind}, not to NF4: it cannot be a base", _16_BIT_HINT
        )
    try:
        settings = json.loads(state.raw(0, _STATE_BYTES).decode("utf-8"))
        rows, columns = settings["shape"]
        if not all(type(size) is int and size > 0 for size in (rows, columns)):
            raise ValueError
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(
            f"{state.path} has a damaged quantisation state for {name!r}", "download the checkpoint again"
        ) from None
    return rows, columns


def _settle_head(
    source: str, config: ModelConfig, structure: Structure, tensors: dict[str, StoredTensor]
) -> tuple[Structure, list[str]]:
    """Whether the head is tied, by transformers' rule.

    Tied by the config and stored with other values, it is not tied. Stored in the place of an embedding that is
    missing, it is both. Not stored and not tied by the text model's config, a wrapper's own config may tie it.
    """
    head, embedding = tensors.get(structure.head), tensors.get(structure.embedding)
    if structure.dims.tied and head is not None and embedding is None:
        tensors[structure.embedding] = head
        return structure, [f"{structure.embedding} is not stored: the tied head, {structure.head}, is both"]
    if structure.dims.tied and head is not None and embedding is not None and not head.same_bytes(embedding):
        why = f"config.json ties the head to the embedding, and {structure.head} is stored with other values: not tied"
        return structure.with_head(tied=False), [why]
    if not structure.dims.tied and head is None and embedding is not None and config.tie_of_whole(source):
        return structure.with_head(tied=True), []
    return structure, []


def _has_place(name: str, structure: Structure) -> bool:
    """A tied head that is stored again stays, as a name of the base: the fingerprint knows it."""
    base = split_part(name)[0]
    return base in structure.shapes or base in structure.buffers or base == structure.head


def refuse_missing(
    source: str, wanted: Iterable[str], found: Container[str], extra: Sequence[str], head: str | None = None
) -> None:
    """Refuse a base that lacks parameters.

    Args:
        source: What the user named.
        wanted: Names of all parameters.
        found: Names of those that are there.
        extra: Names of tensors that are there and have no place, for the message.
        head: Name of the head's matrix.

    Raises:
        InputError: Some are missing.
    """
    missing = [name for name in wanted if name not in found]
    if not missing:
        return
    holds = f"; it holds {summary(extra)} instead" if extra else ""
    if missing == [head]:
        raise InputError(
            f"{source} has no head that predicts the next token: no tensor {head!r}{holds}",
            "use the causal language model, not its embedding, classification or reward form",
        )
    more = f" and {len(missing) - 1} others that its config.json asks for" if len(missing) > 1 else ""
    raise InputError(
        f"{source} has no tensor {missing[0]!r}{more}{holds}",
        "the checkpoint does not match its config.json; download it again",
    )


def check_shape(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Hold a tensor's shape against the config's.

    Raises:
        StorageError: They differ.
    """
    if tuple(found) != tuple(expected):
        raise StorageError(
            f"tensor {name!r} of {source} has shape {tuple(found)}, its config asks for {tuple(expected)}",
            _MISMATCH_HINT,
        )


def _refuse_dtypes(
    source: str, structure: Structure, tensors: Mapping[str, StoredTensor], packed: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse parameters that are stored as anything but floating-point numbers.

    Raises:
        InputError: One is.
    """
    for name in structure.shapes:
        if name not in packed and tensors[name].dtype not in _FLOATS:
            raise InputError(
                f"tensor {name!r} of {source} is stored as {tensors[name].dtype}, which cannot be a base", _16_BIT_HINT
            )


def _leftover(config: ModelConfig, matching: Matching) -> list[str]:
    if not matching.extra:
        return []
    count, shown = len(matching.extra), summary(matching.extra)
    if config.wrapped:
        return [f"the text model is the base: {count} tensors of other parts are left out ({shown})"]
    return [f"{count} tensors that the model has no place for are left out: {shown}"]
