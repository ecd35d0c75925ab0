"""The tokenizer that comes with a base, with the special tokens that its configs name.

``tokenizer.json`` alone says how text becomes tokens, but not which token ends an answer: that stands in
``tokenizer_config.json``, or else as a number in ``generation_config.json`` and ``config.json``. What the first does
not name is taken from the others. Code in a model folder is never run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError, first_line
from qrosa.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIGS = ("generation_config.json", "config.json")


def load_tokenizer(source: str, folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        source: What the user named, for messages.
        folder: Its folder, or its id on the hub.

    Raises:
        InputError: No usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise whatever their parser met
        raise InputError(f"{source} has no usable tokenizer: {first_line(error)}", _hint(Path(folder))) from None
    name_special_tokens(tokenizer, _read_configs(Path(folder)))
    return tokenizer


def name_special_tokens(tokenizer: PreTrainedTokenizerBase, configs: Iterable[Mapping[str, Any]]) -> None:
    """Give a tokenizer the EOS, BOS and padding tokens that it does not name, from the first config that does."""
    found = list(configs)
    for name in ("eos_token", "bos_token", "pad_token"):
        if getattr(tokenizer, name) is not None:
            continue
        for config in found:
            value = config.get(f"{name}_id")
            number = value[0] if isinstance(value, list) and value else value
            if isinstance(number, int) and 0 <= number < len(tokenizer):
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
                break


def _read_configs(folder: Path) -> Iterable[Mapping[str, Any]]:
    for name in _CONFIGS:
        if (folder / name).is_file():
            config = read_json(folder / name)
            yield config
            if isinstance(config.get("text_config"), dict):
                yield config["text_config"]


def _hint(folder: Path) -> str:
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            return "its tokenizer.model needs the sentencepiece package: pip install sentencepiece"
    return "add tokenizer.json and tokenizer_config.json of the model to the folder"
