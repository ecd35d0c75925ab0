"""What is not used is named, and what would change the meaning of a row is refused or honoured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data.dataset import Dataset, load_rows
from qrosa.data.preview import preview
from qrosa.errors import InputError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [Q, A]


def load(tmp_path: Path, *rows: dict[str, Any], template: str | None = made.CHATML, **how: Any) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(path, make_tokenizer(template), **{"seq_len": 128, **how})


def learnt(data: Dataset, template: str | None = made.CHATML) -> list[str]:
    rows = preview(data.rows, make_tokenizer(template), len(data))
    return [text for row in rows for text, supervised in row if supervised]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"messages": CHAT, "id": 7}, {"messages": CHAT}, {"messages": CHAT, "id": 8}], ("column 'id'", 2, "rows", 1)),
        ([{"text": "the film", "label": "good"}], ("column 'label'", 1, "rows", 1)),
        ([{"text": "the film", "label": True}], ("column 'label'", 1, "rows", 1)),
        ([{"prompt": "q", "completion": "a", "score_chosen": 0.5}], ("column 'score_chosen'", 1, "rows", 1)),
        ([{"text": "t", "prompt": "p", "completion": "c"}], ("column 'text'", 1, "rows", 1)),
        ([{"messages": [{**Q, "name": "Ann"}, {**A, "name": "Bob"}]}], ("message key 'name'", 2, "messages", 1)),
        ([{"messages": [Q, {**A, "reasoning_content": "hm"}]}], ("message key 'reasoning_content'", 1, "messages", 1)),
        ([{"messages": CHAT}, {"messages": [Q]}], ("rows dropped", 1, "rows", 2)),
        ([{"messages": [A, Q, A]}], ("answers not learnt", 1, "turns", 1)),
        ([{"prompt": "q", "completion": ""}], ("empty answers", 1, "turns", 1)),
        ([{"messages": CHAT}, {"messages": [Q, {**A, "content": " "}]}], ("empty answers", 1, "turns", 2)),
        ([{"prompt": "q", "completion": "film " * 200}], ("answers cut short", 1, "turns", 1)),
        ([{"messages": turns("q", "a", "film " * 200, "b")}], ("answers cut off", 1, "turns", 1)),
        ([{"prompt": "film " * 200, "completion": "a"}, {"messages": None, **{"prompt": "q", "completion": "a"}}],
         ("rows dropped", 1, "rows", 1)),
        ([{"text": "film " * 200}], ("texts in pieces", 1, "rows", 1)),
    ],
)  # fmt: skip
def test_what_is_passed_over_has_a_name_a_number_and_a_first_place(
    tmp_path: Path, rows: list[dict[str, Any]], told: tuple[str, int, str, int]
) -> None:
    report = load(tmp_path, *rows).report
    what, count, unit, line = told
    [note] = [note for note in report.unused if note.what == what]
    assert (note.count, note.unit, note.first) == (count, unit, f"{tmp_path}/rows.jsonl:{line}")
    assert note.why and note.line in report.told("rows")


def test_nothing_is_told_where_everything_is_used(tmp_path: Path) -> None:
    report = load(tmp_path, {"messages": CHAT, "tools": None, "system": ""}).report
    assert report.unused == () and report.told("rows") == ""


def test_much_that_is_lost_is_a_warning(tmp_path: Path) -> None:
    few, many = [{"messages": CHAT}] * 20 + [{"messages": [Q]}], [{"messages": CHAT}] * 3 + [{"messages": [Q]}]
    assert not load(tmp_path, *few).report.told("rows").startswith("WARNING")
    assert load(tmp_path, *many).report.told("rows").startswith("WARNING: 25% of the rows are cut or dropped")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "column 'label' says whether the answer is wanted"),
        ({"prompt": "q", "completion": "a", "label": "true"}, "column 'label'"),  # as a CSV file has it
        ({"messages": CHAT, "label": True}, "column 'label'"),
        ({"messages": CHAT, "kto_tag": False}, "column 'kto_tag'"),
        ({"messages": CHAT, "chosen": CHAT, "rejected": CHAT}, "column 'chosen' is half of a preference"),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "column 'rejected' is half of a preference"),
        ({"instruction": "i", "output": "o", "rejected_response": "b"}, "column 'rejected_response'"),
        ({"messages": CHAT, "images": ["a.png"]}, "column 'images' holds images"),
        ({"prompt": "q", "completion": "a", "image": {"bytes": "x"}}, "column 'image'"),
        ({"messages": CHAT, "audio": "a.wav"}, "column 'audio'"),
        ({"messages": CHAT, "weight": 0.5}, "column 'weight' weighs the row by 0.5"),
        ({"text": "t", "system": "s"}, "column 'system' is no part of a plain text"),
        ({"messages": CHAT, "history": [["a", "b"]]}, "column 'history' holds earlier turns"),
        ({"messages": CHAT, "functions": [{"name": "f"}]}, "column 'functions'"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "has tools, and the model's chat template takes none"),
        ({"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": {}}]}]}, "calls tools"),
        ({"messages": [Q, {**A, "function_call": {"name": "f", "arguments": "{}"}}]}, "calls tools"),
        ({"messages": [Q, {**A, "weight": 0.5}]}, "messages[1] has weight 0.5"),
        ({"messages": [Q, {**A, "train": "no"}]}, "messages[1] has train 'no'"),
        ({"messages": [{**Q, "train": True}, A]}, "that a user message be learnt"),
        ({"messages": [Q, {**A, "train_detail": [{"begin_offset": 0}]}]}, "marks parts of itself"),
        ({"messages": [{"role": "system", "content": "x"}, Q, A], "system": "y"}, "another system message"),
        ({"messages": CHAT, "system": "x", "system_prompt": "y"}, "two different system texts"),
        ({"messages": [{**Q, "content": [{"type": "image_url", "image_url": "u"}]}, A]}, "content other than text"),
        ({"messages": [Q, {**A, "role": "assist\ud800ant"}]}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, fields)
    assert said in caught.value.message and "rows.jsonl:1: " in caught.value.message
    assert caught.value.hint


def test_naming_the_columns_says_that_others_are_to_be_left_alone(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "label": True}
    data = load(tmp_path, row, columns="prompt=prompt,completion=chosen")
    assert learnt(data) == ["good<|im_end|>"]
    assert [note.what for note in data.report.unused] == ["column 'rejected'", "column 'label'"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": CHAT, "system": "sys"},
        {"messages": CHAT, "system_prompt": "sys"},
        {"messages": [{"role": "system", "content": "sys"}, *CHAT], "system": "sys"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "sys"},
        {"instruction": "q", "input": "", "output": "a", "system": "sys"},
        {"prompt": "q", "completion": "a", "system": "sys"},
        {"prompt": [Q], "completion": [A], "system": "sys"},
    ],
)
def test_a_system_column_is_the_system_message(tmp_path: Path, fields: dict[str, Any]) -> None:
    data = load(tmp_path, fields, template=made.CHATML_DEFAULT_SYSTEM)
    [row] = preview(data.rows, make_tokenizer(made.CHATML_DEFAULT_SYSTEM))
    text = "".join(piece for piece, _ in row)
    assert "<|im_start|>system\nsys<|im_end|>" in text and "be kind" not in text
    assert [piece for piece, supervised in row if supervised] == ["a<|im_end|>"]


def test_a_system_text_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        load(tmp_path, {"prompt": "q", "completion": "a", "system": "s"}, template=None)


def test_a_history_is_learnt_as_earlier_turns(tmp_path: Path) -> None:
    row = {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}
    assert learnt(load(tmp_path, row)) == ["a1<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize("template", [made.CHATML, made.CHATML_MARKED, made.CHATML_MARKED_SHORT])
@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"training": False}, {"masked": True}],
)
def test_marked_messages_are_context(tmp_path: Path, template: str, mark: dict[str, Any]) -> None:
    messages = [Q, {"role": "assistant", "content": "BAD", **mark}, Q, {"role": "assistant", "content": "GOOD"}]
    data = load(tmp_path, {"messages": messages}, template=template)
    assert learnt(data, template) == ["GOOD<|im_end|>"]
    with pytest.raises(InputError, match="train-on all learns every token"):
        load(tmp_path, {"messages": messages}, template=template, train_on="all")


def test_marks_of_sharegpt_turns_and_of_all_messages(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "BAD", "weight": 0}]
    said += [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "GOOD", "weight": 1}]
    assert learnt(load(tmp_path, {"conversations": said})) == ["GOOD<|im_end|>"]
    with pytest.raises(InputError, match="they hold no answer"):
        load(tmp_path, {"messages": [Q, {**A, "weight": 0}]})


@pytest.mark.parametrize("template", [made.CHATML, made.CHATML_MARKED])
def test_the_last_answer_only(tmp_path: Path, template: str) -> None:
    data = load(tmp_path, {"messages": turns("q1", "a1", "q2", "a2")}, template=template, train_on="last")
    assert learnt(data, template) == ["a2<|im_end|>"]


@pytest.mark.parametrize("role", ["tool", "developer", "system", "critic"])
def test_a_role_that_the_template_leaves_out_is_refused(tmp_path: Path, role: str) -> None:
    template = made.CHATML.replace(
        "for message in messages %}", "for message in messages if message.role in ['user', 'assistant'] %}"
    )
    messages = [Q, A, {"role": role, "content": "what it says"}, Q, A]
    with pytest.raises(InputError, match=rf"leaves out message 3 of 5 \(role '{role}'\)") as caught:
        load(tmp_path, {"messages": messages}, template=template)
    assert "--chat-template" in caught.value.hint


def test_a_role_that_the_template_writes_otherwise_is_no_role_left_out(tmp_path: Path) -> None:
    template = made.CHATML.replace("message['content']", "(message['content'] | tojson)")
    load(tmp_path, {"messages": [{"role": "user", "content": 'say "x"\n'}, A]}, template=template)
