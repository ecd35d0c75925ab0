"""The shape of a ``.gguf`` file: its tensor list and metadata, with llama.cpp's names turned into transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qrosa.base.families import Shapes, read_dimensions
from qrosa.base.shape import ModelShape, from_shapes
from qrosa.errors import InputError, StorageError

_FAMILIES = {"gemma3": "gemma3_text"}
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def read_gguf_shape(source: str, path: Path) -> ModelShape:
    """Read a ``.gguf`` file's shape.

    Raises:
        InputError: There is no such file, or it is not a decoder that can be a base.
        StorageError: The file is damaged.
    """
    if not path.is_file():
        raise InputError(f"model file {source} does not exist", "check the path given to --model")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("reading .gguf files needs the gguf package", "pip install 'qrosa[gguf]'") from None
    try:
        reader = GGUFReader(path)
        stored = {t.name: tuple(int(size) for size in reversed(t.shape)) for t in reader.tensors}
        architecture = str(_field(reader, "general.architecture"))
        config = {key: _field(reader, f"{architecture}.{name}") for key, name in _SIZES.items()}
    except PermissionError:
        raise StorageError(f"{source} cannot be read", "check the file's permissions") from None
    except Exception as error:  # the reader trusts the file and fails in many ways on a damaged one
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise StorageError(f"{source} is not a sound GGUF file: {first}", "download the file again") from None
    config["model_type"] = _FAMILIES.get(architecture, architecture)
    config["vocab_size"] = stored.get("token_embd.weight", (None,))[0]
    config["tie_word_embeddings"] = "output.weight" not in stored
    dims = read_dimensions(config, source)
    shapes: Shapes = {_name(name, dims.family): shape for name, shape in stored.items() if name != "rope_freqs.weight"}
    # Blocks are decoded to fp32, a tensor at a time.
    return from_shapes(source, "gguf", "gguf", dims, shapes, stored_bytes=4)


def _field(reader: Any, key: str) -> Any:
    """One metadata value; of a list with an entry a layer, the largest. None when absent."""
    field = reader.fields.get(key)
    value = None if field is None else field.contents()
    return max(value) if isinstance(value, list) else value


def _name(stored: str, family: str) -> str:
    """``blk.0.attn_q.weight`` as ``model.layers.0.self_attn.q_proj.weight``; only the sizes of others count."""
    parts = stored.split(".")
    if parts[0] != "blk" or len(parts) != 4 or parts[2] not in _MODULES:
        return stored
    module = "mlp.gate_up_proj" if family == "phi3" and parts[2] == "ffn_up" else _MODULES[parts[2]]
    return f"model.layers.{parts[1]}.{module}.{parts[3]}"
