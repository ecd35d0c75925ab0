"""What a ``.gguf`` file says of a model beside its weights: architecture, sizes, rotation.

Keys and their meaning are llama.cpp's, written by the ``gguf`` package; which of them a family needs is told by its
config. Rotation that cannot be said in the file is refused: a model that runs with another one answers, only worse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""transformers' ``model_type`` -> llama.cpp's architecture."""


def add_metadata(writer: GGUFWriter, config: Any) -> None:
    """Write the model's sizes and its rotation, and no name: llama.cpp treats some names' tokens in ways of their own.

    Args:
        writer: Of the file.
        config: transformers' config of the text model.

    Raises:
        InputError: A rotation that the file cannot say.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_rotation(writer, config, head_dim)


def _add_rotation(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    rope = _full_rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise InputError(
            f"rotation of kind {kind!r} is not written as GGUF here",
            "export --format safetensors, and turn that folder into GGUF with llama.cpp's convert_hf_to_gguf.py",
        )


def _full_rope(config: Any) -> dict[str, Any]:
    """The rotation of layers with full attention; that of sliding layers is fixed in llama.cpp."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention") or rope)


def rope_factors(config: Any) -> Any:
    """What each frequency is divided by, fp32 [head_dim / 2], for Llama 3's rotation; None for others."""
    rope = _full_rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(scaled.numel(), dtype=torch.float32) / scaled.numel()
    plain = 1.0 / float(rope["rope_theta"]) ** exponents
    return (plain / scaled).float().numpy()
