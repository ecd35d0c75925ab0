"""The shape of a ``.gguf`` file: its tensor list and metadata, with llama.cpp's names turned into transformers'.

Torch-free for the architectures with an entry in ``families``; any other is opened as for loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qrosa.base.checkpoint import refuse_missing
from qrosa.base.dimensions import Dimensions, Shapes, read_dimensions
from qrosa.base.families import FAMILIES, Family
from qrosa.base.gguf_file import GGUFFile, open_gguf
from qrosa.base.shape import ModelShape, from_structure
from qrosa.base.structure import Structure, known_structure

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
    "num_experts": "expert_count",
}
_ARCHITECTURES = {family.gguf or name: name for name, family in FAMILIES.items()}


def read_gguf_shape(source: str, path: Path) -> ModelShape:
    """Read a ``.gguf`` file's shape.

    Raises:
        InputError: It is not a decoder that can be a base.
        StorageError: The file is damaged.
    """
    file = open_gguf(source, path)
    family = _ARCHITECTURES.get(file.architecture)
    if family is None:
        from qrosa.base.gguf import GGUFBase

        base = GGUFBase(source, file)
        return from_structure(source, "gguf", "gguf", base.structure, stored_bytes=4, notes=base.notes)
    dims = read_dimensions(_config(file, family), source)
    promised = known_structure(dims)
    shapes: Shapes = {_name(name, dims.switches): file.shape(name) for name in file.tensors}
    refuse_missing(source, [f"{path}.weight" for path in promised.linears], shapes, ())
    placed = {f"{path}.weight" for path in promised.linears}
    extra = [name for name in shapes if name.startswith("model.layers.") and _is_matrix(name) and name not in placed]
    kept = {name: shape for name, shape in shapes.items() if name not in extra and not _of_lost_layer(name, dims)}
    structure = Structure(dims, kept, promised.linears)
    notes = (f"{len(extra)} matrices that the model has no place for are left out: {extra[0]}",) if extra else ()
    # Blocks are decoded to fp32, a tensor at a time.
    return from_structure(source, "gguf", "gguf", structure, stored_bytes=4, notes=notes)


def _config(file: GGUFFile, family: str) -> dict[str, Any]:
    config = {key: file.field(f"{file.architecture}.{name}") for key, name in _SIZES.items()}
    config["model_type"] = family
    config["vocab_size"] = file.shape("token_embd.weight")[0] if "token_embd.weight" in file.tensors else None
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    return config


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight")


def _of_lost_layer(name: str, dims: Dimensions) -> bool:
    """A norm or bias of a layer beyond the model's."""
    parts = name.split(".")
    return parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= dims.layers


def _name(stored: str, switches: Family) -> str:
    """``blk.0.attn_q.weight`` as ``model.layers.0.self_attn.q_proj.weight``; only the sizes of others count."""
    parts = stored.split(".")
    if parts[0] != "blk" or len(parts) != 4 or parts[2] not in _MODULES:
        return stored
    module = "mlp.gate_up_proj" if switches.fused_gate and parts[2] == "ffn_up" else _MODULES[parts[2]]
    return f"model.layers.{parts[1]}.{module}.{parts[3]}"
