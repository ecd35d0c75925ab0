"""What a row means: five kinds, and every way in which a row can fail to be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrosa.data.formats import Completion, Conversation, RawRow, Text, read_rows
from qrosa.errors import InputError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def example(**fields: Any) -> Any:
    return RawRow(fields, "f.jsonl:3").example()


def test_the_five_kinds_by_their_keys() -> None:
    assert example(messages=CHAT) == Conversation(CHAT)
    assert example(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]) == Conversation(CHAT)
    assert example(instruction="i", input="x", output="o") == Completion("i\n\nx", "o", alpaca=("i", "x"))
    assert example(instruction="i", output="o") == Completion("i", "o", alpaca=("i", ""))
    assert example(instruction="i", input=None, output="o") == Completion("i", "o", alpaca=("i", ""))
    assert example(prompt="p", completion="c") == Completion("p", "c")
    assert example(text="t") == Text("t")


def test_other_keys_are_passed_over_and_the_first_kind_counts() -> None:
    assert example(text="t", id=7, label="x") == Text("t")
    assert RawRow({"text": "t", "messages": CHAT}).kind == "messages"
    assert RawRow({"messages": None, "text": "t"}).kind == "text"  # a table's missing columns read as null


def test_prompts_and_completions_may_be_messages() -> None:
    assert example(prompt=CHAT[:1], completion=CHAT[1:]) == Conversation(CHAT, first=1)
    assert example(prompt="q", completion=CHAT[1:]) == Conversation(CHAT, first=1)
    assert example(prompt=CHAT[:1], completion="a") == Conversation(CHAT, first=1)


def test_sharegpt_names_become_roles() -> None:
    said = [
        {"from": name, "value": "x"} for name in ("system", "Human", "user", "gpt", "chatgpt", "tool", "observation")
    ]
    roles = [message["role"] for message in example(conversations=said).messages]
    assert roles == ["system", "user", "user", "assistant", "assistant", "tool", "tool"]
    assert example(conversations=CHAT) == Conversation(CHAT)  # roles under this key are common too
    first = example(conversations=[{"from": "human", "value": "q"}], system="s").messages[0]
    assert first == {"role": "system", "content": "s"}


def test_messages_may_be_json_text_as_in_csv() -> None:
    assert example(messages=json.dumps(CHAT)) == Conversation(CHAT)


def test_contents_may_be_text_parts_and_nulls_are_left_out() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = example(messages=[{"role": "user", "content": parts, "name": None}])
    assert row.messages == [{"role": "user", "content": "one two"}]


def test_tools_and_tool_calls_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = example(messages=[CHAT[0], call], tools='[{"name": "f"}]')
    assert row.tools == [{"name": "f"}]
    assert row.messages[1] == {key: value for key, value in call.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "no known kind of row has these keys: none"),
        ({"question": "q", "answer": "a"}, "no known kind of row has these keys: 'question', 'answer'"),
        ({"prompt": "p"}, "no known kind of row has these keys: 'prompt'"),
        ({"text": None}, "'text' of this text row is null"),
        ({"prompt": "p", "completion": None}, "'completion' of this prompt-completion row is null"),
        ({"text": 7}, "'text' is a number, not a text"),
        ({"text": True}, "'text' is true or false, not a text"),
        ({"text": ["a"]}, "'text' is a list, not a text"),
        ({"text": "\ud800"}, "'text' holds half of a surrogate pair"),
        ({"prompt": 1, "completion": "c"}, "'prompt' is a number, not a text"),
        ({"prompt": "p", "completion": {"a": 1}}, "'completion' is an object, not a text"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'input' is a number"),
        ({"instruction": "i", "output": 3}, "'output' is a number"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' is a text, not a list"),
        ({"messages": {"role": "user"}}, "'messages' is an object, not a list"),
        ({"messages": ["hello"]}, "messages[0] is a text"),
        ({"messages": [None]}, "messages[0] is null"),
        ({"messages": [CHAT[0], {"content": "a"}]}, "messages[1] has no role"),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0] content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content other than text"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "conversations[0] is from 'martian'"),
        ({"conversations": [{"from": None, "value": "x"}]}, "conversations[0] is from None"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no content"),
        ({"messages": CHAT, "tools": "no json"}, "'tools' is not valid JSON"),
        ({"messages": CHAT, "tools": [1]}, "'tools' is not a list of objects"),
    ],
)
def test_malformed_rows_name_their_place(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        RawRow(fields, "f.jsonl:3").example()
    assert caught.value.message.startswith("f.jsonl:3: ")
    assert said in caught.value.message
    assert caught.value.hint


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_read_rows_streams_rows_with_their_place(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    assert list(read_rows(path)) == [RawRow({"text": "one"}, f"{path}:1"), RawRow({"text": "two"}, f"{path}:2")]


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"prompt": "p", "completion": "c"})
    with pytest.raises(InputError, match=r"a\.jsonl:2 is a prompt-completion row, but .*a\.jsonl:1 is a text row"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("b.json", ""), ("a.csv", "text\n")]
)
def test_a_source_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match="holds no rows"):
        list(read_rows(path))
