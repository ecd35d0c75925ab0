"""What a config.json says of the text model, which is what is fine-tuned, before anything is built. Torch-free.

Wrappers (vision, audio) keep the text model's config in a part of theirs. A config that no entry of ``families`` covers
is given to transformers, whose import is put off until then. Whatever in a config.json names code to run, or a kernel
to fetch, is dropped: no code of a model folder is ever run, and nobody is asked whether it may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.base.families import FAMILIES, TEXT_TWINS
from qrosa.errors import InputError, StorageError
from qrosa.files import read_json

_CODE_KEYS = re.compile(r"auto_map|custom_pipelines|_?(attn|experts)_implementation.*|use_kernels?")
_HEADLESS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction|"
    r"PreTraining|FeatureExtraction|Retrieval|\w*Classification|Regression|CTC)$|(Reward|Embedding|Encoder)Model$"
)


@dataclass(frozen=True)
class ModelConfig:
    """A config.json, and the text model's part of it.

    Attributes:
        whole: As read, without what names code.
        text: The text model's values; its ``model_type`` is that of a causal language model.
        notes: What was decided that a reader may not expect, a sentence each.
    """

    whole: Mapping[str, Any]
    text: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def wrapped(self) -> bool:
        """The text model is a part of a larger one."""
        return self.whole.get("model_type") != self.text.get("model_type")

    @property
    def family(self) -> str:
        """The text model's ``model_type``."""
        return str(self.text.get("model_type", ""))

    def tie_of_whole(self, source: str) -> bool:
        """Whether the whole model, wrapper and all, ties its head; for checkpoints that store none."""
        told = self.whole.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        if told is None and self.wrapped:
            from qrosa.base.library_config import make_config

            told = getattr(make_config(self.whole, source), "tie_word_embeddings", False)
        return bool(told)


def read_model_config(source: str, folder: Path) -> ModelConfig:
    """Read a folder's config.json.

    Raises:
        InputError: There is none, or it is not a decoder's.
        StorageError: It is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{source} has no config.json", "give the folder of a Hugging Face model")
    return model_config(read_json(path), source)


def model_config(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Find the text model in a config.

    Raises:
        InputError: Not a model that predicts tokens from left to right.
    """
    _refuse_headless(config, source)
    for part in (config, config.get("text_config")):
        _refuse_two_sided(part if isinstance(part, Mapping) else {}, source)
    whole = without_code(config)
    for part in (whole, whole.get("text_config")):
        if isinstance(part, Mapping) and not isinstance(part.get("model_type", ""), str | None):
            raise StorageError(
                f"the config.json of {source} has a model_type that is no text", "copy or download the file again"
            )
    notes = []
    if _names_code(config):
        notes.append("config.json names code of its own (auto_map), which is not run: transformers' class is used")
    text = _text_part(whole)
    if text.get("model_type") not in FAMILIES:
        from qrosa.base.library_config import text_values

        text = _as_twin(text_values(whole, source, names_code=_names_code(config)))
    return ModelConfig(whole, text, tuple(notes))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that name code or kernels, at any depth."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not (isinstance(key, str) and _CODE_KEYS.fullmatch(key))
    }


def _names_code(config: Mapping[str, Any]) -> bool:
    return "auto_map" in config


def _text_part(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's values where the config itself shows them."""
    inner = whole.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(whole)
    return _as_twin({**inner, "model_type": inner.get("model_type") or whole.get("model_type")})


def _as_twin(text: dict[str, Any]) -> dict[str, Any]:
    """A wrapper's text model under the name of the causal language model that computes the same on text."""
    twin = TEXT_TWINS.get(str(text.get("model_type")))
    if twin is None:
        return text
    plain = {**text, "model_type": twin}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(plain.get(key), Mapping):
            plain[key] = _plain_rotation(plain[key])
    return plain


def _plain_rotation(rotation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotation of text, where the three positions of a token are one number."""
    plain = {key: value for key, value in rotation.items() if not key.startswith("mrope")}
    for key in ("type", "rope_type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain if plain.keys() - {"type"} else None


def _refuse_two_sided(part: Mapping[str, Any], source: str) -> None:
    """Refuse a decoder's class that was trained to read to both sides, as embedding models are.

    Raises:
        InputError: The config says so.
    """
    if part.get("use_bidirectional_attention") is True or part.get("is_causal") is False:
        raise InputError(
            f"{source} is an encoder, which reads to both sides ({part.get('model_type')}), not a decoder",
            "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )


def _refuse_headless(config: Mapping[str, Any], source: str) -> None:
    """Refuse a model that says itself that it predicts no tokens.

    Raises:
        InputError: It does.
    """
    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str) and _HEADLESS.search(name):
            raise InputError(
                f"{source} is a {name}: it has no head that predicts the next token",
                "use the causal language model that it was made from",
            )
    if config.get("is_encoder_decoder"):
        raise InputError(
            f"{source} is an encoder-decoder ({config.get('model_type')}), not a decoder",
            "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
