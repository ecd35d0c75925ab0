"""From a config.json to the shapes of all parameters, without building the model.

transformers would build it on the meta device, but importing torch alone takes longer than a whole plan may. So the
list of a decoder's matrices is written down once, here, with the switches of ``families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrosa.base.families import FAMILIES, LLAMA_LIKE, Family
from qrosa.errors import InputError

Shapes = dict[str, tuple[int, ...]]

KNOWN_HINT = "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3"
_MOST_LAYERS, _LARGEST = 10_000, 1 << 27  # far above any model: what a damaged config says must not be built
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class LayerCount:
    """What one decoder layer of a family without an entry was counted to save for backward, without data.

    The most of all layers: for a row of L tokens ``fixed + L * a_token + L * L * a_pair`` bytes.

    Attributes:
        fixed: Bytes that do not depend on L.
        a_token: Bytes for each token.
        a_pair: Bytes for each pair of tokens, where a layer keeps scores or a mask.
    """

    fixed: int
    a_token: int
    a_pair: int

    def saved(self, tokens: int, length: int) -> int:
        """Bytes for a micro-batch of T tokens in rows of L."""
        return self.fixed + tokens * (self.a_token + length * self.a_pair)


@dataclass(frozen=True)
class Dimensions:
    """The sizes and switches of a decoder.

    Attributes:
        family: transformers' ``model_type``.
        switches: How the family's layers are built; Llama's way where the family has no entry.
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
        counted: What a layer saves, where the family has no entry and was counted instead.
    """

    family: str
    switches: Family
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
    counted: LayerCount | None = None

    @property
    def known(self) -> bool:
        """The family has an entry."""
        return self.family in FAMILIES

    @property
    def query_width(self) -> int:
        """heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def masks(self) -> int:
        """Attention masks that exist at once."""
        return 2 if self.switches.two_masks else 1


def read_dimensions(config: Mapping[str, Any], source: str) -> Dimensions:
    """Read a text model's config.

    Raises:
        InputError: A key that a decoder has is missing, a mixture of experts, or sizes that make no sense.
    """
    family = str(config.get("model_type", ""))
    switches = FAMILIES.get(family, LLAMA_LIKE)
    values = {**switches.defaults, **{key: value for key, value in config.items() if value is not None}}
    missing = [key for key in _SIZES if key not in values]
    if missing:
        raise InputError(f"the config.json of {source} is not a known decoder's: {missing[0]} is missing", KNOWN_HINT)
    refuse_experts(values, source)
    sizes = {key: _count(values, key, source) for key in _SIZES}
    if sizes["num_hidden_layers"] > _MOST_LAYERS or max(sizes.values()) > _LARGEST:
        raise InputError(f"the config.json of {source} has sizes that no model has", "download the model again")
    heads = sizes["num_attention_heads"]
    bias = bool(values.get("attention_bias"))
    return Dimensions(
        family=family,
        switches=switches,
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=_count(values, "num_key_value_heads", source, heads),
        head_dim=_count(values, "head_dim", source, sizes["hidden_size"] // heads or 1),
        vocab=sizes["vocab_size"],
        max_positions=_count(values, "max_position_embeddings", source, 2048),
        tied=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bias or switches.attention_bias,
        output_bias=bias or switches.output_bias,
        mlp_bias=bool(values.get("mlp_bias")) or switches.mlp_bias,
        head_norms=switches.head_norms or bool(values.get("qk_layernorm")),
        attention_softcap=switches.softcap and values.get("attn_logit_softcapping") is not None,
        logit_softcap=values.get("final_logit_softcapping") is not None,
        sliding_window=_sliding_window(config, switches),
    )


def refuse_experts(values: Mapping[str, Any], source: str) -> None:
    """Refuse a mixture of experts.

    Raises:
        InputError: It is one.
    """
    if any(_count(values, key, source, 0) > 1 for key in _EXPERTS if values.get(key) is not None):
        raise experts_refused(source)


def experts_refused(source: str) -> InputError:
    """The error for a mixture of experts."""
    return InputError(
        f"{source} is a mixture of experts, whose expert layers are not linear modules",
        "use a dense model such as Llama, Mistral, Qwen, Gemma or Phi-3",
    )


def _sliding_window(config: Mapping[str, Any], switches: Family) -> int:
    """0 where it is not used; unlike other values, a null is not the same as none given."""
    if switches.window_switch and not config.get("use_sliding_window"):
        return 0
    window = config.get("sliding_window", switches.window)
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
    shapes |= _norm(f"model.{dims.switches.final_norm}", dims.hidden, dims)
    if not dims.tied:
        shapes |= _linear("lm_head", dims.vocab, dims.hidden, dims.switches.head_bias)
    return shapes


def _layer_shapes(dims: Dimensions) -> Shapes:
    shapes = _attention_shapes(dims) | _feed_forward_shapes(dims)
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for name in norms[: dims.switches.wide_norms]:
        shapes |= _norm(name, dims.hidden, dims)
    return shapes


def _attention_shapes(dims: Dimensions) -> Shapes:
    d, query, key, switches = dims.hidden, dims.query_width, dims.key_width, dims.switches
    output = _linear(f"self_attn.{switches.output}", d, query, dims.output_bias)
    if switches.fused_qkv:
        return output | _linear("self_attn.qkv_proj", query + 2 * key, d, False)
    shapes: Shapes = {}
    for name, width in (("q", query), ("k", key), ("v", key)):
        shapes |= _linear(f"self_attn.{name}_proj", width, d, dims.attention_bias)
    shapes |= output
    if dims.head_norms:
        for name in ("q", "k"):
            shapes |= _norm(f"self_attn.{name}_{switches.head_norm}", dims.head_dim, dims)
    return shapes


def _feed_forward_shapes(dims: Dimensions) -> Shapes:
    d, f, bias = dims.hidden, dims.intermediate, dims.mlp_bias
    if not dims.switches.gated:
        return _linear("mlp.fc1", f, d, bias) | _linear("mlp.fc2", d, f, bias)
    if dims.switches.fused_gate:
        return _linear("mlp.gate_up_proj", 2 * f, d, False) | _linear("mlp.down_proj", d, f, False)
    shapes: Shapes = {}
    for name, (n, k) in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
        shapes |= _linear(f"mlp.{name}_proj", n, k, bias)
    return shapes


def _linear(path: str, out_features: int, in_features: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{path}.weight": (out_features, in_features)}
    return shapes | ({f"{path}.bias": (out_features,)} if bias else {})


def _norm(path: str, width: int, dims: Dimensions) -> Shapes:
    shapes: Shapes = {f"{path}.weight": (width,)}
    return shapes | ({f"{path}.bias": (width,)} if dims.switches.layer_norm else {})
