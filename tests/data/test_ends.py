"""Where an answer ends: which token does, who names it, and tokens that the model does not know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.base.speech import Speech, with_ends
from qrosa.base.tokenizer import load_tokenizer
from qrosa.data.dataset import load_rows
from qrosa.data.encode import Encoder
from qrosa.data.formats import RawRow
from qrosa.errors import InputError


def ends(tokenizer: Any, *rows: dict[str, Any]) -> list[str]:
    encoder = Encoder(tokenizer, seq_len=128)
    encoder.encode([RawRow(row, "f:1") for row in rows])
    return [tokenizer.convert_ids_to_tokens(token) for token in sorted(encoder.ends)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (made.CHATML, ["<|im_end|>"]),
        (made.CHATML_MARKED, ["<|im_end|>"]),
        (made.LLAMA, ["<|eot|>"]),
        (made.SYSTEM_LAST, ["</s>"]),
        (made.PLAIN, ["</s>"]),
        (made.EOS_LAST, ["<|eot|>"]),
        (None, ["</s>"]),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_token_that_ends_learnt_answers_is_known_whatever_the_config_says(
    template: str | None, expected: list[str], named: bool
) -> None:
    tokenizer = make_tokenizer(template)
    if not named and expected != ["</s>"]:
        tokenizer.eos_token = "</s>"
    assert ends(tokenizer, {"prompt": "q", "completion": "a"}) == expected


def test_an_answer_that_is_a_special_token_is_no_end() -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, seq_len=64)
    [row] = encoder.encode([RawRow({"prompt": "q", "completion": "<|stop|>"}, "f:1")])
    assert row.completion_text(tokenizer) == "<|stop|>"
    assert tokenizer.convert_ids_to_tokens(sorted(encoder.ends)) == ["</s>"]


def test_cut_answers_end_with_nothing() -> None:
    tokenizer = make_tokenizer(made.CHATML)
    encoder = Encoder(tokenizer, seq_len=16)
    encoder.encode([RawRow({"prompt": "q", "completion": "film " * 99}, "f:1")])
    assert encoder.ends == set()


def bare_folder(tiny_model_dir: Callable[..., Path], target: Path, **configs: dict[str, Any]) -> Path:
    """A model folder with tokenizer.json as its only file of a tokenizer, and some values of its configs changed."""
    shutil.copytree(tiny_model_dir(), target)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (target / name).unlink(missing_ok=True)
    for name, values in configs.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_tokenizer_json_alone_is_enough_where_a_config_names_the_end(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bare_folder(tiny_model_dir, tmp_path / "m")
    tokenizer = load_tokenizer(str(folder), folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|bos|>")
    assert ends(tokenizer, {"prompt": "q0: ", "completion": "a"}) == ["<|im_end|>"]


def test_without_any_name_for_it_rows_with_answers_are_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    nothing = {"eos_token_id": None}
    folder = bare_folder(tiny_model_dir, tmp_path / "m", config=nothing, generation_config=nothing)
    tokenizer = load_tokenizer(str(folder), folder)
    with pytest.raises(InputError, match="no token ends an answer") as caught:
        ends(tokenizer, {"prompt": "q0: ", "completion": "a"})
    assert "eos_token" in caught.value.hint
    assert ends(tokenizer, {"text": "a text needs no end"}) == []


def test_a_list_of_ends_names_the_first(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("m", tiny_model_dir())
    two = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    folder = bare_folder(tiny_model_dir, tmp_path / "m", generation_config={"eos_token_id": two})
    assert load_tokenizer(str(folder), folder).eos_token == "<|im_end|>"


@pytest.mark.parametrize("fields", [{"prompt": "q", "completion": "<label>"}, {"messages": turns("<label>", "a")}])
def test_tokens_beyond_the_vocabulary_are_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(made.CHATML)
    size = len(tokenizer)
    tokenizer.add_tokens(["<label>"], special_tokens=True)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns("q", "a")}) + "\n" if "messages" in fields else "")
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(InputError, match=rf"rows\.jsonl:{line}: token '<label>' has id {size}") as caught:
        load_rows(path, tokenizer, seq_len=64, vocabulary=size)
    assert f"the model knows {size} tokens" in caught.value.message
    assert load_rows(path, tokenizer, seq_len=64, vocabulary=size + 1).report.rows == line


def test_what_ends_answers_stands_in_an_adapter_and_in_what_is_exported() -> None:
    speech = Speech((7, 9), "{{ messages }}")
    assert Speech.of(speech.to_config()) == speech and Speech.of({}) == Speech()
    cases = [(None, (), None), (None, (7,), 7), (2, (2,), 2), (2, (7,), [2, 7]), ([2, 3], (3, 7), [2, 3, 7])]
    for known, learnt, expected in cases:
        assert with_ends(known, learnt) == expected
