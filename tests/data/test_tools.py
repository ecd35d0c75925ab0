"""Tool calls: the forms that data and templates have for them, and what tables do to nested objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data.dataset import load_rows
from qrosa.data.encode import Encoder
from qrosa.data.formats import RawRow
from qrosa.data.preview import preview
from qrosa.errors import InputError

_CALLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' }}ARGUMENTS{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen, Llama: an object is written as JSON. DeepSeek V3: a text is joined. Newer ones: both.
OBJECTS = "{% if tools %}{{ tools | tojson }}{% endif %}" + _CALLS.replace(
    "ARGUMENTS", "{{ call.function.arguments | tojson }}"
)
TEXTS = OBJECTS.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
PRINTS = OBJECTS.replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")
BOTH = OBJECTS.replace(
    "{{ call.function.arguments | tojson }}",
    "{% set a = call.function.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}",
)
# Llama 3.1: one call a message, and a list means that there are calls.
SINGLE = OBJECTS.replace(
    "{{ '<|im_start|>'",
    "{% if message.tool_calls is defined and message.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls') }}{% endif %}{{ '<|im_start|>'",
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
# R1: only a null says that there are calls. GLM: a null is written as it is. Others: the key must be there.
NULL = OBJECTS.replace("(message.content or '')", "('' if message.content is none else message.content.strip())")
WRITTEN = OBJECTS.replace("(message.content or '')", "message.content | string")
STRICT = OBJECTS.replace("(message.content or '')", "message.content.strip()")
LEARNT = '<call>weather {"city": "Oslo"}<|im_end|>'


def learnt(template: str, fields: dict[str, Any]) -> list[str]:
    tokenizer = make_tokenizer(template)
    rows = Encoder(tokenizer, seq_len=256).encode([RawRow(fields, "f:1")])
    return [text for row in preview(rows, tokenizer) for text, supervised in row if supervised]


def chat(*answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *answer], "tools": TOOLS}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("template", [OBJECTS, TEXTS, PRINTS, BOTH, SINGLE, NULL, WRITTEN, STRICT])
@pytest.mark.parametrize(
    "message",
    [
        call({"city": "Oslo"}),
        call('{"city": "Oslo"}'),
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"role": "assistant", "tool_calls": json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}])},
        {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ],
)  # fmt: skip
def test_arguments_reach_the_template_in_the_form_that_it_takes(template: str, message: dict[str, Any]) -> None:
    assert learnt(template, chat(message)) == [LEARNT]


@pytest.mark.parametrize("call_role", ["function_call", "tool_call"])
@pytest.mark.parametrize("result_role", ["observation", "tool", "function_response", "tool_response"])
def test_sharegpt_roles_of_tools(call_role: str, result_role: str) -> None:
    said = [
        {"from": "human", "value": "q"},
        {"from": call_role, "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": result_role, "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    fields = {"conversations": said, "tools": json.dumps(TOOLS)}
    assert learnt(OBJECTS, fields) == [LEARNT, "It rains.<|im_end|>"]


def test_empty_lists_of_calls_are_no_calls() -> None:
    messages = [{**message, "tool_calls": []} for message in turns("q", "a")]
    assert learnt(SINGLE, {"messages": messages}) == ["a<|im_end|>"]
    assert learnt(made.CHATML, {"messages": messages}) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (call("Oslo"), "a text that is no JSON object: 'Oslo'"),
        (call("[1]"), "no JSON object"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "tool call without a name"),
        ({"role": "assistant", "tool_calls": "{"}, "tool_calls is not valid JSON"),
        ({"role": "function_call", "content": "weather in Oslo"}, "content is not valid JSON"),
    ],
)
def test_malformed_calls_name_their_place(message: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"^f:1: ") as caught:
        learnt(OBJECTS, chat(message))
    assert said in caught.value.message


@pytest.mark.parametrize("form", ["parquet", "arrow", "datasets"])
def test_nulls_that_tables_put_into_objects_are_dropped(tmp_path: Path, form: str) -> None:
    rows = [chat(call({"city": "Oslo"})), chat(call({"zone": "CET"}))]
    if form == "datasets":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
        source = tmp_path / "d"
    else:
        source = _table(tmp_path / f"t.{form}", rows)
    tokenizer = make_tokenizer(OBJECTS)
    data = load_rows(source, tokenizer, seq_len=256)
    text = "".join(piece for row in preview(data.rows, tokenizer) for piece, _ in row)
    assert '{"city": "Oslo"}' in text and '{"zone": "CET"}' in text and "null" not in text


def _table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with arrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path
