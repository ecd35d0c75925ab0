"""The model that transformers builds from a config, on the meta device: empty, to be filled, or only to be looked at.

The one place that makes models of transformers' classes. They come from transformers' own registry by ``model_type``,
never from a model folder: ``trust_remote_code`` is False, and nothing asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import replace_module, target_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.dimensions import KNOWN_HINT, Dimensions, Shapes, experts_refused
from qrosa.base.families import LLAMA_LIKE
from qrosa.base.fuse import fuse_layers
from qrosa.base.library_config import config_value
from qrosa.base.structure import Structure
from qrosa.errors import InputError, first_line
from qrosa.ops.few_rows_head import OutputHead
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with meta parameters; its (computed) buffers are real.

    Raises:
        InputError: The architecture is not a causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # an unsupported config surfaces as ValueError, KeyError or AttributeError
        raise InputError(
            f"{getattr(config, 'model_type', 'this')} cannot be built as a causal LM: {first_line(error)}", KNOWN_HINT
        ) from None
    model.tie_weights()  # making parameters meta one by one has untied them
    return model


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with meta parameters and meta ``QRosaLinear`` layers; its (computed) buffers are real.

    Raises:
        InputError: The architecture is not a causal language model, or has no suitable linear layers.
    """
    model = meta_model(config, dtype)
    fuse_layers(model)
    for path, linear in target_linears(model).items():
        weight = NF4Weight.meta((linear.out_features, linear.in_features), dtype)
        replace_module(model, path, QRosaLinear(weight, linear.bias))
    _turn_head(model)
    model.tie_weights()
    model.requires_grad_(False)
    return model


def _turn_head(model: PreTrainedModel) -> None:
    """Put a head that is quick for few rows in the place of a plain one."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        replace_module(model, _path_of(model, head), OutputHead.of(head))


def structure_of(model: PreTrainedModel, source: str) -> Structure:
    """The structure of a model that was built.

    Raises:
        InputError: A mixture of experts, an encoder, or a model without a head or linear layers.
    """
    _refuse_unsuitable(model, source)
    linears = target_linears(model)
    shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Structure(
        dims=_dimensions(model, linears, source),
        shapes=shapes,
        linears=tuple(linears),
        buffers={name: tuple(tensor.shape) for name, tensor in saved_buffers(model).items()},
        head=f"{_path_of(model, model.get_output_embeddings())}.weight",
        embedding=f"{_path_of(model, model.get_input_embeddings())}.weight",
        prefix=model.base_model_prefix,
        rename=_renamer(model),
        ignored=(r"rotary_emb\.inv_freq$", *patterns),
    )


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that belong to a checkpoint and are no parameters, by name, in model order."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not isinstance(module, QRosaLinear)  # whose buffers are the adapter's
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _refuse_unsuitable(model: PreTrainedModel, source: str) -> None:
    kind = model.config.model_type
    if any(".experts." in f"{name}." and parameter.ndim > 2 for name, parameter in model.named_parameters()):
        raise experts_refused(source)
    two_sided = any(getattr(module, "is_causal", True) is False for module in model.modules())
    if model.config.is_encoder_decoder or two_sided:
        what = "an encoder-decoder" if model.config.is_encoder_decoder else "an encoder, which reads to both sides"
        raise InputError(f"{source} is {what} ({kind}), not a decoder", KNOWN_HINT)
    if model.get_output_embeddings() is None or model.get_input_embeddings() is None:
        raise InputError(f"{source} ({kind}) has no head that predicts the next token", KNOWN_HINT)


def _dimensions(model: PreTrainedModel, linears: Mapping[str, nn.Linear], source: str) -> Dimensions:
    """Sizes by which planning bounds what it has no formula for: always the largest of all layers."""
    config, embedding = model.config, cast(Tensor, model.get_input_embeddings().weight)
    hidden = _largest(config, "hidden_size", embedding.shape[1])
    heads = _largest(config, "num_attention_heads", 1)
    head = model.get_output_embeddings()
    return Dimensions(
        family=config.model_type,
        switches=LLAMA_LIKE,
        hidden=hidden,
        intermediate=max(max(layer.in_features, layer.out_features) for layer in linears.values()),
        layers=_largest(config, "num_hidden_layers", len(linears)),
        heads=heads,
        kv_heads=_largest(config, "num_key_value_heads", heads),
        head_dim=_largest(config, "head_dim", max(1, hidden // heads)),
        vocab=int(embedding.shape[0]),
        max_positions=_largest(config, "max_position_embeddings", 2048),
        tied=head.weight is embedding,
        attention_softcap=bool(config_value(config, "attn_logit_softcapping")),
        logit_softcap=bool(config_value(config, "final_logit_softcapping")),
        sliding_window=_largest(config, "sliding_window", 0),
    )


def _largest(config: PretrainedConfig, key: str, default: int) -> int:
    """A whole number of a config, the largest where it has one for each layer."""
    value = config_value(config, key)
    numbers = [number for number in (value if isinstance(value, (list, tuple)) else [value]) if type(number) is int]
    return max(numbers, default=default) or default


def _renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """transformers' rule for stored names of this class; what it would also have to compute with is not renamed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, saved = get_model_conversion_mapping(model), dict(model.state_dict())
    plain = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    computed = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(stored: str) -> str:
        name, pattern = rename_source_key(stored, plain, computed, model.base_model_prefix, saved)
        return stored if pattern is not None else name

    return rename


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((path for path, other in model.named_modules() if other is module), "")
