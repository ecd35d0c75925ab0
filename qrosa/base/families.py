"""From a config.json to the shapes of all parameters, without building the model.

transformers would build it on the meta device, but importing torch alone takes longer than a whole plan may. A decoder
of the supported families is the same list of matrices with a few switches (fused projections, biases, extra norms), so
the list is written down once, here, and a test holds it against the model that transformers builds. config.json files
leave out values that equal their class's defaults; those defaults are here too. Unknown families are read as
Llama-like where their config has Llama's keys, and the shape says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrosa.errors import InputError

Shapes = dict[str, tuple[int, ...]]

# What a config.json may leave out, by model_type (transformers 5, configuration_<family>.py).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma2": {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
               "tie_word_embeddings": True, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "phi3": {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
             "num_attention_heads": 32, "max_position_embeddings": 4096},
    "phi": {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "max_position_embeddings": 2048},
}  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "gemma2": 4096, "gemma3_text": 4096}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Dimensions:
    """The sizes and switches of a decoder.

    Attributes:
        family: transformers' ``model_type``.
        known: False when an unknown family is taken for Llama-like.
        hidden: d, width of the residual stream.
        intermediate: f, width of the feed-forward block.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Rows of the embedding.
        max_positions: Longest row the model was made for, in tokens.
        tied: The head shares the embedding's matrix.
        attention_bias: Biases on q, k and v.
        output_bias: Bias on o.
        mlp_bias: Biases in the feed-forward block.
        head_norms: Norms on the queries and keys of each head.
        attention_softcap: Scores pass through a tanh, which only eager attention can do.
        logit_softcap: So do the logits.
        sliding_window: Tokens that a token sees in layers with sliding attention; 0 where there are none.
    """

    family: str
    known: bool
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    sliding_window: int = 0

    @property
    def query_width(self) -> int:
        """heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def wide_norms(self) -> int:
        """Norms over the residual stream in one layer."""
        return {"gemma2": 4, "gemma3_text": 4, "phi": 1}.get(self.family, 2)

    @property
    def fused_gate(self) -> bool:
        """Gate and up projection are one matrix."""
        return self.family == "phi3"

    @property
    def masks(self) -> int:
        """Attention masks that exist at once: sliding-window families keep two."""
        return 2 if self.family in ("gemma2", "gemma3_text") else 1


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config; multimodal ones keep it under ``text_config``."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    family = inner.get("model_type") or {"gemma3": "gemma3_text"}.get(str(config.get("model_type")), "")
    return {**inner, "model_type": family}


def read_dimensions(config: Mapping[str, Any], source: str) -> Dimensions:
    """Read a text model's config.

    Raises:
        InputError: Not a decoder with Llama's keys, a mixture of experts, or sizes that make no sense.
    """
    family = str(config.get("model_type", ""))
    values = _DEFAULTS.get(family, {}) | {key: value for key, value in config.items() if value is not None}
    missing = [key for key in _SIZES if key not in values]
    if missing:
        raise InputError(
            f"the config.json of {source} is not a known decoder's: {missing[0]} is missing",
            "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
    if any(_count(values, key, source, 0) > 1 for key in _EXPERTS):
        raise InputError(
            f"{source} is a mixture of experts, whose expert layers are not linear modules",
            "use a dense model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
    sizes = {key: _count(values, key, source) for key in _SIZES}
    heads = sizes["num_attention_heads"]
    bias = bool(values.get("attention_bias"))
    return Dimensions(
        family=family,
        known=family in _DEFAULTS,
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=_count(values, "num_key_value_heads", source, heads),
        head_dim=_count(values, "head_dim", source, sizes["hidden_size"] // heads or 1),
        vocab=sizes["vocab_size"],
        max_positions=_count(values, "max_position_embeddings", source, 2048),
        tied=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bias or family in ("qwen2", "phi"),
        output_bias=bias or family == "phi",
        mlp_bias=bool(values.get("mlp_bias")) or family == "phi",
        head_norms=family in ("qwen3", "gemma3_text") or bool(values.get("qk_layernorm")),
        attention_softcap=values.get("attn_logit_softcapping") is not None and family != "gemma3_text",
        logit_softcap=values.get("final_logit_softcapping") is not None,
        sliding_window=_sliding_window(config, family),
    )


def _sliding_window(config: Mapping[str, Any], family: str) -> int:
    """0 where it is not used; unlike other values, a null is not the same as none given."""
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return 0
    window = config.get("sliding_window", _WINDOW.get(family, 0))
    return window if type(window) is int and window > 0 else 0


def _count(values: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or value < (0 if default == 0 else 1):
        raise InputError(f"the config.json of {source} has {key} {value!r}", "it should be a whole number above zero")
    return value


def parameter_shapes(dims: Dimensions) -> Shapes:
    """Every parameter by name, in the model's order; a tied head is left out."""
    shapes: Shapes = {"model.embed_tokens.weight": (dims.vocab, dims.hidden)}
    for index in range(dims.layers):
        prefix = f"model.layers.{index}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(dims).items()}
    final = "model.final_layernorm" if dims.family == "phi" else "model.norm"
    shapes |= _norm(final, dims.hidden, dims)
    if not dims.tied:
        shapes |= _linear("lm_head", dims.vocab, dims.hidden, dims.family == "phi")
    return shapes


def _layer_shapes(dims: Dimensions) -> Shapes:
    d, f, query, key = dims.hidden, dims.intermediate, dims.query_width, dims.key_width
    shapes: Shapes = {}
    if dims.family == "phi3":
        shapes |= _linear("self_attn.o_proj", d, query, False)
        shapes |= _linear("self_attn.qkv_proj", query + 2 * key, d, False)
        shapes |= _linear("mlp.gate_up_proj", 2 * f, d, False) | _linear("mlp.down_proj", d, f, False)
    else:
        for name, width in (("q", query), ("k", key), ("v", key)):
            shapes |= _linear(f"self_attn.{name}_proj", width, d, dims.attention_bias)
        output = "dense" if dims.family == "phi" else "o_proj"
        shapes |= _linear(f"self_attn.{output}", d, query, dims.output_bias)
        if dims.head_norms:
            stem = "layernorm" if dims.family == "phi" else "norm"
            shapes |= _norm(f"self_attn.q_{stem}", dims.head_dim, dims)
            shapes |= _norm(f"self_attn.k_{stem}", dims.head_dim, dims)
        if dims.family == "phi":
            shapes |= _linear("mlp.fc1", f, d, True) | _linear("mlp.fc2", d, f, True)
        else:
            for name, (n, k) in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
                shapes |= _linear(f"mlp.{name}_proj", n, k, dims.mlp_bias)
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for name in norms[: dims.wide_norms]:
        shapes |= _norm(name, d, dims)
    return shapes


def _linear(path: str, out_features: int, in_features: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{path}.weight": (out_features, in_features)}
    return shapes | ({f"{path}.bias": (out_features,)} if bias else {})


def _norm(path: str, width: int, dims: Dimensions) -> Shapes:
    shapes: Shapes = {f"{path}.weight": (width,)}
    return shapes | ({f"{path}.bias": (width,)} if dims.family == "phi" else {})
