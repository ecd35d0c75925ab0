"""Thoughts: what is learnt is what the model will be asked to say, whichever way rows and templates write them."""

from __future__ import annotations

from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data.encode import Encoder
from qrosa.data.formats import RawRow
from qrosa.data.preview import preview

# DeepSeek-R1: history drops thoughts, and the generation prompt opens one.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|im_start|>assistant{{ '\n' + m.content.split('</think>')[-1] }}<|im_end|>{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n<think>\n' }}{% endif %}"
)
# The same without a line end behind the tag, as R1's own.
R1_TIGHT = R1.replace("'\n<think>\n'", "'\n<think>'")
# Templates that read a key: the thought of the last turn stands between tags, others are dropped.
KEYED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.KEY and loop.last %}{{ '<think>\n' + m.KEY + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops every thought, that of the last turn too, and opens none.
STRIPS = R1.replace("{{ '\n<think>\n' }}", "{{ '\n' }}")
# Closes an empty thought in the generation prompt: the model is asked for answers without one.
NO_THINKING = R1.replace("'\n<think>\n'", "'\n<think>\n\n</think>\n\n'")

CONTENT = {"content": "<think>\ntwo and two\n</think>\n\n4"}
UNDER_KEY = {"content": "4", "reasoning_content": "two and two"}
WHOLE = "<think>\ntwo and two\n</think>\n\n4<|im_end|>"


def split_row(template: str, fields: dict[str, Any], **how: Any) -> tuple[str, str]:
    """What stands before the learnt part, and the learnt part."""
    tokenizer = make_tokenizer(template)
    [row] = Encoder(tokenizer, seq_len=256, **how).encode([RawRow(fields, "f:1")])
    [pieces] = preview([row], tokenizer)
    kept = [index for index, (_, supervised) in enumerate(pieces) if supervised]
    assert len(kept) == 1
    return "".join(text for text, _ in pieces[: kept[0]]), pieces[kept[0]][0]


def chat(answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **answer}]}


@pytest.mark.parametrize(
    "fields",
    [
        chat(CONTENT),
        chat(UNDER_KEY),
        chat({"content": "4", "reasoning": "two and two"}),
        chat({"content": "4", "thinking": "two and two"}),
        chat({"content": [{"type": "thinking", "thinking": "two and two"}, {"type": "text", "text": "4"}]}),
        {"prompt": "2+2?", "completion": CONTENT["content"]},
        {"instruction": "2+2?", "output": CONTENT["content"]},
    ],
)
@pytest.mark.parametrize(
    ("template", "opened"),
    [
        (R1, "<think>\n"),
        (R1_TIGHT, "<think>"),
        (STRIPS, ""),
        (made.THINKING, ""),
        (made.OPEN_THOUGHT, "<think>\n"),
    ],
)
def test_the_last_answer_is_prompt_thought_end_of_thought_and_answer(
    template: str, opened: str, fields: dict[str, Any]
) -> None:
    asked, said = split_row(template, fields)
    assert asked.endswith("<|im_start|>assistant\n" + opened)
    assert opened + said == WHOLE


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_gets_the_thought_under_the_key_that_it_reads(key: str, given: str) -> None:
    assert split_row(KEYED.replace("KEY", key), chat({"content": "4", given: "two and two"}))[1] == WHOLE


def test_an_answer_without_a_thought_closes_the_one_that_is_opened() -> None:
    assert split_row(R1, chat({"content": "4"}))[1] == "\n</think>\n\n4<|im_end|>"


def test_loss_on_all_tokens_has_the_thought_too() -> None:
    tokenizer = make_tokenizer(R1)
    [row] = Encoder(tokenizer, seq_len=256, train_on="all").encode([RawRow(chat(CONTENT), "f:1")])
    assert "two and two\n</think>\n\n4<|im_end|>" in tokenizer.decode(row.input_ids)


def test_earlier_thoughts_that_history_drops_are_not_unlearnt() -> None:
    thought = "<think>\nhm\n</think>\n\n"
    tokenizer = make_tokenizer(R1)
    fields = {"messages": turns("q1", thought + "a1", "q2", thought + "a2")}
    [row] = Encoder(tokenizer, seq_len=256).encode([RawRow(fields, "f:1")])
    [pieces] = preview([row], tokenizer)
    assert [text for text, supervised in pieces if supervised] == ["hm\n</think>\n\na2<|im_end|>"]
    assert row.skipped_turns == 1


def test_a_thought_that_the_prompt_closes_is_not_learnt() -> None:
    tokenizer = make_tokenizer(NO_THINKING)
    [row] = Encoder(tokenizer, seq_len=256).encode([RawRow(chat(CONTENT), "f:1")])
    assert row.supervised_tokens == 0 and row.skipped_turns == 1
