"""The shape of a base: its matrices and sizes, read from headers, never from weights.

Three sources, best first: the headers of a folder's safetensors files (a few kilobytes each), the tensor list of a
``.gguf`` file, or config.json alone (a hub id, or a folder whose weights are not there yet). Module paths are those of
the transformers model in every case, so a plan names the modules that training will.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrosa.adapters.rank_units import LinearShape, layer_index
from qrosa.base.checkpoint import quantisation
from qrosa.base.dimensions import KNOWN_HINT, Dimensions
from qrosa.base.model_config import model_config
from qrosa.base.structure import Structure
from qrosa.base.structure_source import read_structure
from qrosa.errors import InputError


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What planning needs to know of a base. Compared by identity, so that figures of one are kept by ``cache``.

    Attributes:
        source: What the user named.
        kind: ``dense``, ``nf4`` (quantised by bitsandbytes) or ``gguf``.
        read_from: ``headers``, ``gguf`` or ``config``.
        dims: Sizes and switches of the decoder.
        linears: The decoder's matrices, which are quantised and adapted, in model order.
        unquantised: Name -> number of elements of everything else (embeddings, norms, biases, an untied head).
        stored_bytes: Bytes an element in the checkpoint as it is read for quantising.
        nested: The absmax values are quantised too (always, when qrosa quantises).
        notes: What a reader may not expect of how the base was read, a sentence each.
    """

    source: str
    kind: str
    read_from: str
    dims: Dimensions
    linears: tuple[LinearShape, ...]
    unquantised: Mapping[str, int]
    stored_bytes: int = 2
    nested: bool = True
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, and what a plan of a family without an entry rests on."""
        if self.dims.known:
            return self.notes
        words = (
            f"{self.dims.family} has no entry in qrosa: sizes are those of the model that transformers builds, saved "
            "activations are counted on it without data, and the workspace of a layer is a bound; --simulate is exact"
        )
        return (words, *self.notes)

    @property
    def base_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(linear.size for linear in self.linears) + sum(self.unquantised.values())


def from_config(source: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json promises.

    Raises:
        InputError: Not a decoder that can be a base.
    """
    described = model_config(config, source)
    kind = quantisation(described, source)
    return from_structure(source, kind, "config", read_structure(described, source), notes=described.notes)


def from_structure(source: str, kind: str, read_from: str, structure: Structure, **extra: Any) -> ModelShape:
    """Sort parameters into the matrices that are quantised and the rest."""
    linears, rest = [], dict(structure.shapes)
    for path in structure.linears:
        rows, columns = rest.pop(f"{path}.weight")
        linears.append(LinearShape(path, rows, columns, layer_index(path)))
    if not linears:
        raise InputError(f"{source} has no linear layers in a stack of decoder layers", KNOWN_HINT)
    counts = {name: math.prod(shape) for name, shape in rest.items()}
    return ModelShape(source, kind, read_from, structure.dims, tuple(linears), counts, **extra)
