"""The shape of a base: its matrices and sizes, read from headers, never from weights.

Three sources, best first: the headers of a folder's safetensors files (a few kilobytes each), the tensor list of a
``.gguf`` file, or config.json alone (a hub id, or a folder whose weights are not there yet). Module paths are those of
the transformers model in every case, so a plan names the modules that training will.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qrosa.adapters.budget import LinearShape
from qrosa.base.families import Dimensions, Shapes, parameter_shapes, read_dimensions, text_config
from qrosa.errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a base.

    Attributes:
        source: What the user named.
        kind: ``dense``, ``nf4`` (quantised by bitsandbytes) or ``gguf``.
        read_from: ``headers``, ``gguf`` or ``config``.
        dims: Sizes and switches of the decoder.
        linears: The decoder's matrices, which are quantised and adapted, in model order.
        unquantised: Name -> number of elements of everything else (embeddings, norms, biases, an untied head).
        stored_bytes: Bytes an element in the checkpoint as it is read for quantising.
        nested: The absmax values are quantised too (always, when qrosa quantises).
        known: Figures that ``parts`` has derived from all of this, each computed once.
    """

    source: str
    kind: str
    read_from: str
    dims: Dimensions
    linears: tuple[LinearShape, ...]
    unquantised: dict[str, int]
    stored_bytes: int = 2
    nested: bool = True
    known: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def base_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(linear.size for linear in self.linears) + sum(self.unquantised.values())


def from_config(source: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json promises.

    Raises:
        InputError: Not a decoder that can be a base.
    """
    dims = read_dimensions(text_config(config), source)
    return from_shapes(source, base_kind(source, config, has_nf4=False), "config", dims, parameter_shapes(dims))


def from_shapes(source: str, kind: str, read_from: str, dims: Dimensions, shapes: Shapes, **extra: Any) -> ModelShape:
    """Sort parameters into matrices of the decoder's layers and the rest."""
    linears, rest = [], {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        layer = layer_index(path)
        if leaf == "weight" and layer >= 0 and len(shape) == 2:
            linears.append(LinearShape(path, shape[0], shape[1], layer))
        else:
            rest[name] = math.prod(shape)
    if not linears:
        raise InputError(
            f"{source} has no linear layers in a stack of decoder layers",
            "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
    return ModelShape(source, kind, read_from, dims, tuple(linears), rest, **extra)


def layer_index(path: str) -> int:
    """Index of the decoder layer in a module's path, -1 when the path has none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def base_kind(source: str, config: Mapping[str, Any], *, has_nf4: bool) -> str:
    """``dense`` or ``nf4``; other quantisations cannot be a base."""
    settings = config.get("quantization_config")
    if has_nf4 or settings is None:
        return "nf4" if has_nf4 else "dense"
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method", "an unknown method")
    if method == "bitsandbytes" and settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        return "nf4"
    raise InputError(
        f"{source} is quantised with {method}, which cannot be a base",
        "use the 16-bit checkpoint, or one quantised to NF4 by bitsandbytes",
    )
