"""The tokenizer inside a ``.gguf`` file: tokens, their types, merges, special ids, and the chat template.

A base that was a ``.gguf`` file gives its own entries, as they are. Any other must be byte-level BPE, and the way it
cuts text before merging must be one that llama.cpp has a name for, found by the pattern in the tokenizer itself.
llama.cpp would take any name and cut otherwise, which no error would show, so an unknown pattern is refused. So is
SentencePiece's kind, whose scores a ``tokenizer.json`` does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrosa.base.gguf import GGUFBase
from qrosa.errors import InputError
from qrosa.export.source import OpenedAdapter

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_BY_LLAMA_CPP = "export --format safetensors, and turn that folder into GGUF with llama.cpp's convert_hf_to_gguf.py"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
"""The pattern that text is split by -> llama.cpp's name of it."""
_UNUSED, _CONTROL, _USER_DEFINED, _NORMAL = 5, 3, 4, 1


def add_tokenizer(writer: GGUFWriter, opened: OpenedAdapter) -> None:
    """Write the tokenizer that was trained with.

    Raises:
        InputError: One that is not byte-level BPE, or that llama.cpp has no name for.
    """
    tokenizer = opened.tokenizer()
    if isinstance(opened.base_files, GGUFBase):
        _copy(writer, opened.base_files)
    else:
        _add_bpe(writer, tokenizer, opened.base_files.config.vocab_size)
    ends = [token for token in opened.speech.end_tokens if token != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])
    template = tokenizer.chat_template
    if isinstance(template, str):
        writer.kv_data[0].pop("tokenizer.chat_template", None)
        writer.add_chat_template(template)


def end_texts(opened: OpenedAdapter) -> list[str]:
    """The texts of the tokens that end an answer."""
    tokenizer = opened.tokenizer()
    ends = dict.fromkeys([*opened.speech.end_tokens, tokenizer.eos_token_id])
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ends if token is not None]


def _copy(writer: GGUFWriter, base: GGUFBase) -> None:
    from gguf import GGUFValueType

    for key, field in base.file.readers[0].fields.items():
        if key.startswith("tokenizer.") or key == "general.name":  # llama.cpp knows some tokenizers by it
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)


def _add_bpe(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        raise InputError("only byte-level BPE tokenizers are written as GGUF here", _BY_LLAMA_CPP)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(state))
    tokens, types = _tokens(state, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    )
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    alone = list(tokenizer("").input_ids)
    writer.add_add_bos_token(bool(alone) and alone[0] == tokenizer.bos_token_id)


def _tokens(state: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows that no token has are named and unused."""
    by_id = {token: (text, _NORMAL) for text, token in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    rows = [by_id.get(row, (f"[PAD{row}]", _UNUSED)) for row in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def pre_tokenizer_name(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way that text is cut before merging.

    Args:
        state: The tokenizer as ``tokenizer.json`` has it.

    Raises:
        InputError: It has none.
    """
    pre = state.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    byte_level = next((step for step in steps if step.get("type") == "ByteLevel"), {})
    plain = not byte_level.get("add_prefix_space") and (state.get("normalizer") or {}).get("type") in (None, "NFC")
    if plain and kinds == ["ByteLevel"] and byte_level.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and byte_level.get("use_regex"):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex")
    if plain and kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex") and pattern in _PATTERNS:
        return _PATTERNS[pattern]
    raise InputError("llama.cpp's name of this tokenizer's way to cut text is not known here", _BY_LLAMA_CPP)
