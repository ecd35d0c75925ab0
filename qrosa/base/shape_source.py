"""Where the shape of a base is read: a local folder, a ``.gguf`` file, or the config.json of a hub id.

Headers of a folder's safetensors files are best (a few kilobytes each); config.json alone has to do for a hub id, or
for a folder whose weights are not there yet. Torch-free, so that a plan stays quick.
"""

from __future__ import annotations

import json
from pathlib import Path

from qrosa.base.families import Dimensions, Shapes, parameter_shapes, read_dimensions, text_config
from qrosa.base.gguf_shape import read_gguf_shape
from qrosa.base.shape import ModelShape, base_kind, from_config, from_shapes, layer_index
from qrosa.errors import InputError, StorageError
from qrosa.files import DTYPE_BYTES, read_json, read_safetensors_header

_NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
_INDEX = "model.safetensors.index.json"
# Multimodal checkpoints keep the text model, which is what is fine-tuned, under one of these.
_TEXT_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", ""))
_MODEL_HINT = "give a local folder, a .gguf file, or a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"


def read_shape(source: str) -> ModelShape:
    """Read the shape of a local folder, a ``.gguf`` file or a hub id.

    Raises:
        InputError: There is no such model, or it is of a kind that cannot be a base.
        StorageError: Its files are damaged.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return read_gguf_shape(source, path)
    if path.is_dir():
        return _from_folder(source, path)
    if path.exists():
        raise InputError(
            f"{source} is neither a model folder nor a .gguf file", "give the folder that holds config.json"
        )
    return from_config(source, read_json(_hub_config(source)))


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
    kind = base_kind(source, config, has_nf4=any(name.endswith(_NF4_STATE) for name in dtypes))
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
