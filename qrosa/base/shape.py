"""The shape of a base: its matrices and sizes, read from headers, never from weights.

Three sources, best first: the headers of a folder's safetensors files (a few kilobytes each), the tensor list of a
``.gguf`` file, or config.json alone (a hub id, or a folder whose weights are not there yet). Module paths are those of
the transformers model in every case, so a plan names the modules that training will.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrosa.adapters.budget import LinearShape
from qrosa.base.families import Dimensions, Shapes, parameter_shapes, read_dimensions, text_config
from qrosa.errors import InputError, StorageError
from qrosa.files import DTYPE_BYTES, read_json, read_safetensors_header

_NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
_INDEX = "model.safetensors.index.json"
# Multimodal checkpoints keep the text model, which is what is fine-tuned, under one of these.
_TEXT_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", ""))
_MODEL_HINT = "give a local folder, a .gguf file, or a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"


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

    @classmethod
    def from_source(cls, source: str) -> ModelShape:
        """Read the shape of a local folder, a ``.gguf`` file or a hub id.

        Raises:
            InputError: There is no such model, or it is of a kind that cannot be a base.
            StorageError: Its files are damaged.
        """
        path = Path(source).expanduser()
        if path.suffix.lower() == ".gguf":
            from qrosa.base.gguf_shape import read_gguf_shape

            return read_gguf_shape(source, path)
        if path.is_dir():
            return _from_folder(source, path)
        if path.exists():
            raise InputError(
                f"{source} is neither a model folder nor a .gguf file", "give the folder that holds config.json"
            )
        return from_config(source, read_json(_hub_config(source)))


def from_config(source: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json promises.

    Raises:
        InputError: Not a decoder that can be a base.
    """
    dims = read_dimensions(text_config(config), source)
    return from_shapes(source, _kind(source, config, False), "config", dims, parameter_shapes(dims))


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


def _from_folder(source: str, folder: Path) -> ModelShape:
    if not (folder / "config.json").is_file():
        raise InputError(f"{source} has no config.json", "give the folder of a Hugging Face model")
    config = read_json(folder / "config.json")
    files = _safetensors_files(folder)
    if not files:
        return from_config(source, config)
    dims = read_dimensions(text_config(config), source)
    shapes, dtypes, nested = _stored_shapes(files, dims)
    if not shapes:
        return from_config(source, config)
    promised = list(parameter_shapes(dims)) if dims.known else []
    order = {name: place for place, name in enumerate(promised)}
    # Model order, as the loaded model has it: headers are sorted by name or by shard.
    ordered = dict(sorted(shapes.items(), key=lambda item: (order.get(item[0], len(order)), layer_index(item[0]))))
    kind = _kind(source, config, any(name.endswith(_NF4_STATE) for name in dtypes))
    stored = max((DTYPE_BYTES[dtypes[name]] for name in ordered if name in dtypes), default=2)
    return from_shapes(source, kind, "headers", dims, ordered, stored_bytes=max(stored, 2), nested=nested)


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that make up the model, or none when any is missing: then the config has to do."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise StorageError(f"{index} has no weight map", "download the file again")
    files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    return files if all(file.is_file() for file in files) else []


def _stored_shapes(files: list[Path], dims: Dimensions) -> tuple[Shapes, dict[str, str], bool]:
    """Parameter name -> shape as the model has it, name -> stored dtype, and whether absmax values are nested."""
    shapes: Shapes = {}
    dtypes: dict[str, str] = {}
    for file in files:
        header, start = read_safetensors_header(file)
        for stored, (dtype, shape, span) in header.items():
            name = _text_name(stored)
            dtypes[name] = dtype
            if name.endswith(_NF4_STATE):
                shapes[name.removesuffix(_NF4_STATE) + ".weight"] = _packed_shape(
                    file, start + span[0], start + span[1]
                )
            elif _is_parameter(name, dims) and dtype != "U8":
                shapes[name] = shape
    packed = any(name.endswith(_NF4_STATE) for name in dtypes)
    return shapes, dtypes, not packed or any(name.endswith(".weight.nested_absmax") for name in dtypes)


def _packed_shape(file: Path, start: int, end: int) -> tuple[int, ...]:
    """The [N, K] that bitsandbytes wrote into its quantisation state, a small JSON text stored as a tensor."""
    with open(file, "rb") as handle:
        handle.seek(start)
        raw = handle.read(min(end - start, 1 << 16))
    try:
        shape = json.loads(raw.decode("utf-8"))["shape"]
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(f"{file} has a damaged quantisation state", "download the checkpoint again") from None
    return tuple(shape)


def _is_parameter(name: str, dims: Dimensions) -> bool:
    """Leave out what is stored but is no parameter of the text model: NF4's companions, buffers, a tied head."""
    if name.startswith(("vision_", "multi_modal_projector", "model.vision_", "model.multi_modal_projector", "audio_")):
        return False
    if name.endswith("rotary_emb.inv_freq") or (dims.tied and name.startswith("lm_head.")):
        return False
    return name.endswith((".weight", ".bias"))


def _text_name(stored: str) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored.removeprefix(prefix)
    return stored


def _kind(source: str, config: Mapping[str, Any], has_nf4: bool) -> str:
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


def _hub_config(source: str) -> str:
    """Fetch config.json of a hub model, or find it in the hub's cache."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or not source.strip():
        raise InputError(f"model {source!r} does not exist", _MODEL_HINT)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(source, "config.json")
    except HFValidationError:
        raise InputError(f"model {source!r} does not exist", _MODEL_HINT) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"model {source!r} is no local folder and is not in the Hugging Face cache, and the hub cannot be reached",
            _MODEL_HINT,
        ) from None
    except Exception as error:  # the hub client's errors differ by transport
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"model {source!r} cannot be fetched: {first}", _MODEL_HINT) from None
