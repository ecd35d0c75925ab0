"""The families of decoders that are known without transformers: what differs from Llama, one record each.

A decoder is the same list of matrices with a few switches: fused projections, biases, extra norms, another activation.
To add a family, add its record here; a test holds each against the model that transformers builds, parameter for
parameter, and another against the tensors that autograd saves. Source: transformers 5, ``modeling_<family>.py`` and
``configuration_<family>.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a family's decoder layers are built; the defaults are Llama's.

    Attributes:
        defaults: What a config.json may leave out, because it equals the class's default.
        gguf: llama.cpp's name of the architecture, where it differs from ``model_type``.
        wide_norms: Norms over the residual stream in one layer.
        layer_norm: LayerNorm with a bias; else RMSNorm, computed in fp32.
        parallel: Attention and feed-forward block read the output of one norm.
        head_norms: Norms on the queries and keys of each head, always.
        attention_bias: Biases on q, k and v, always.
        output_bias: A bias on the attention's output projection, always.
        mlp_bias: Biases in the feed-forward block, always.
        head_bias: A bias on the output head.
        fused_qkv: q, k and v are one matrix.
        fused_gate: Gate and up projection are one matrix.
        gated: gate, up and down projection; else two matrices, fc1 and fc2.
        inner_saved: Tensors [T, f] that the feed-forward block saves for backward: gate, up, and the product that the
            down projection reads; of an ungated one with GELU by its tanh formula its four steps and the result.
        partial_rotation: Only a part of each head is rotated, and joined to the rest again.
        softcap: Attention scores are capped where the config says so.
        two_masks: Layers with full and with sliding attention take turns, each kind with a mask of its own.
        window: The sliding window that a config leaves out; 0 for none.
        window_switch: The window counts only under ``use_sliding_window``.
        output: Name of the attention's output projection.
        final_norm: Name of the norm before the head.
        head_norm: Stem of the names of the norms on queries and keys.
    """

    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    gguf: str | None = None
    wide_norms: int = 2
    layer_norm: bool = False
    parallel: bool = False
    head_norms: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    fused_qkv: bool = False
    fused_gate: bool = False
    gated: bool = True
    inner_saved: int = 3
    partial_rotation: bool = False
    softcap: bool = True
    two_masks: bool = False
    window: int = 0
    window_switch: bool = False
    output: str = "o_proj"
    final_norm: str = "norm"
    head_norm: str = "norm"


def _defaults(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int, **more: Any
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": positions,
        }
        | more
    )


LLAMA_LIKE = Family()

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(_defaults(32000, 4096, 11008, 32, 32, 2048)),
        "mistral": Family(_defaults(32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8), window=4096),
        "qwen2": Family(
            _defaults(151936, 4096, 22016, 32, 32, 32768, num_key_value_heads=32),
            attention_bias=True,
            window=4096,
            window_switch=True,
        ),
        "qwen3": Family(
            _defaults(151936, 4096, 22016, 32, 32, 32768, num_key_value_heads=32, head_dim=128),
            head_norms=True,
            window=4096,
            window_switch=True,
        ),
        "gemma2": Family(
            _defaults(
                *(256000, 2304, 9216, 26, 8, 8192),
                num_key_value_heads=4,
                head_dim=256,
                tie_word_embeddings=True,
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
            ),
            wide_norms=4,
            two_masks=True,
            window=4096,
        ),
        "gemma3_text": Family(
            _defaults(
                *(262208, 2304, 9216, 26, 8, 131072), num_key_value_heads=4, head_dim=256, tie_word_embeddings=True
            ),
            gguf="gemma3",
            wide_norms=4,
            head_norms=True,
            softcap=False,
            two_masks=True,
            window=4096,
        ),
        "phi3": Family(
            _defaults(32064, 3072, 8192, 32, 32, 4096), fused_qkv=True, fused_gate=True, partial_rotation=True
        ),
        "phi": Family(
            _defaults(51200, 2048, 8192, 24, 32, 2048),
            wide_norms=1,
            layer_norm=True,
            parallel=True,
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
            gated=False,
            inner_saved=5,
            partial_rotation=True,
            output="dense",
            final_norm="final_layernorm",
            head_norm="layernorm",
        ),
    }
)

TEXT_TWINS: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "qwen2_vl_text": "qwen2",
        "qwen2_5_vl_text": "qwen2",
        "qwen2_5_omni_text": "qwen2",
        "qwen3_vl_text": "qwen3",
    }
)
"""Text models of wrappers that are, on text alone, another family's model.

Qwen's wrappers give each token three positions (time, height, width), which are the same number for text, and then
their rotation is the plain one; a test holds the logits of both against each other.
"""
