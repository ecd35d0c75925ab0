"""transformers' config object of a config.json's values: by its own registry, never by code of a model folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrosa.base.dimensions import KNOWN_HINT
from qrosa.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_config(values: Mapping[str, Any], source: str, *, names_code: bool = False) -> PretrainedConfig:
    """transformers' config of a config.json's values, without its quantisation.

    Raises:
        InputError: No ``model_type`` that this transformers knows, or values that its class refuses.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = "; it comes with code of its own, which is never run" if names_code else ""
        raise InputError(
            f"the config.json of {source} is not understood: "
            f"transformers {transformers.__version__} knows no model_type {kind!r}{own}",
            "use a decoder-only model that this version of transformers knows",
        )
    plain = {key: copy.deepcopy(value) for key, value in values.items() if key != "quantization_config"}
    try:
        config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:  # config classes raise whatever their checks met
        raise InputError(
            f"the config.json of {source} is not understood: {first_line(error)}",
            "use a decoder-only model that this version of transformers knows",
        ) from None
    return config


def text_values(whole: Mapping[str, Any], source: str, *, names_code: bool = False) -> dict[str, Any]:
    """The text model's values of a config that transformers has to read.

    Raises:
        InputError: Not understood, or an encoder-decoder.
    """
    config = make_config(whole, source, names_code=names_code)
    if config.is_encoder_decoder:
        raise InputError(f"{source} is an encoder-decoder ({config.model_type}), not a decoder", KNOWN_HINT)
    text = config.get_text_config(decoder=True)
    inner = whole if text is config else whole.get("text_config")
    values = inner if isinstance(inner, Mapping) else text.to_dict()
    return {**values, "model_type": text.model_type}


def config_value(config: PretrainedConfig, key: str) -> Any:
    """A value of a config, None where it has none; a list where its layers differ in it, the common value first."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers refuses to answer for all layers at once
        values = config.to_dict()
        return [values.get(key), *(layer[key] for layer in values["per_layer_config"].values() if key in layer)]
