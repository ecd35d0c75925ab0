"""Rows to tokens: boundaries, BOS and EOS, cuts, and what evaluation reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns
from hypothesis import given
from hypothesis import strategies as st

from qrosa.data.encode import IGNORE, Encoder, encode, encode_prompt
from qrosa.data.formats import RawRow
from qrosa.data.preview import preview
from qrosa.errors import InputError

SEQ_LEN = 512
TOKENIZER = make_tokenizer()
ENCODER = Encoder(TOKENIZER, seq_len=SEQ_LEN)


def row_of(tokenizer: Any, fields: dict[str, Any], seq_len: int = SEQ_LEN, train_on: str = "completion") -> Any:
    return encode(RawRow(fields, "f:1"), tokenizer, seq_len=seq_len, train_on=train_on)


def learnt(tokenizer: Any, row: Any) -> str:
    return "".join(text for text, supervised in preview([row], tokenizer)[0] if supervised)


def whole(tokenizer: Any, row: Any) -> str:
    return "".join(text for text, _ in preview([row], tokenizer)[0])


def test_tokens_are_those_of_the_chat_template() -> None:
    for shape, source in made.SHAPES.items():
        tokenizer = make_tokenizer(source.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
        for messages in (turns("the film?", "yes"), turns("q1", " a1\n", "q2 ", "\n\na2", system="sys")):
            expected = tokenizer.apply_chat_template(messages)["input_ids"]
            assert row_of(tokenizer, {"messages": messages}).input_ids == expected, shape


def test_markers_and_prefixes_agree() -> None:
    marked, bare = make_tokenizer(made.CHATML_MARKED), make_tokenizer(made.CHATML)
    fields = {"messages": turns("q1", "a1", "q2", "a2")}
    assert row_of(marked, fields).labels == row_of(bare, fields).labels


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompt_and_alpaca_rows_go_through_a_chat_template(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(made.CHATML, adds_bos=adds_bos)
    chat = row_of(tokenizer, {"messages": turns("q\n\nx", "a")})
    assert row_of(tokenizer, {"prompt": "q\n\nx", "completion": "a"}) == chat
    assert row_of(tokenizer, {"instruction": "q", "input": "x", "output": "a"}) == chat
    assert row_of(tokenizer, {"prompt": turns("q\n\nx"), "completion": "a"}) == chat


class TestWithoutChatTemplate:
    def test_prompt_and_completion_are_joined_as_they_are(self) -> None:
        tokenizer = make_tokenizer()
        row = row_of(tokenizer, {"prompt": "the film:", "completion": " yes"})
        assert preview([row], tokenizer)[0] == [("the film:", False), (" yes</s>", True)]

    def test_alpaca_rows_wear_the_fixed_frame(self) -> None:
        tokenizer = make_tokenizer()
        row = row_of(tokenizer, {"instruction": "add {1}", "input": "2", "output": "3"})
        text, answer = preview([row], tokenizer)[0]
        assert text[0].startswith("Below is an instruction that describes a task, paired with an input")
        assert text[0].endswith("### Instruction:\nadd {1}\n\n### Input:\n2\n\n### Response:\n")
        assert answer == ("3</s>", True)
        bare = whole(tokenizer, row_of(tokenizer, {"instruction": "add", "input": " ", "output": "3"}))
        assert "### Input" not in bare and bare.endswith("### Instruction:\nadd\n\n### Response:\n3</s>")

    def test_chat_rows_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"f:1: chat messages, but .* no chat template"):
            row_of(make_tokenizer(), {"messages": turns("q", "a")})


class TestBosAndEos:
    def test_a_tokenizer_that_adds_bos_adds_one(self) -> None:
        tokenizer = make_tokenizer(adds_bos=True)
        for fields in ({"text": "the film"}, {"text": "<s>the film"}, {"prompt": "<s>the", "completion": " film"}):
            row = row_of(tokenizer, fields)
            assert row.input_ids.count(tokenizer.bos_token_id) == 1
            assert row.input_ids[0] == tokenizer.bos_token_id
            assert whole(tokenizer, row) == "<s>the film</s>"

    def test_a_tokenizer_that_does_not_add_bos_adds_none(self) -> None:
        tokenizer = make_tokenizer()
        assert tokenizer.bos_token_id not in row_of(tokenizer, {"text": "the film"}).input_ids

    def test_bos_in_the_template_is_not_doubled(self) -> None:
        tokenizer = make_tokenizer(made.LLAMA, adds_bos=True)
        row = row_of(tokenizer, {"messages": turns("q", "a")})
        assert row.input_ids.count(tokenizer.bos_token_id) == 1

    @pytest.mark.parametrize("template", [None, made.CHATML])
    def test_eos_is_learnt_though_it_is_the_pad_token(self, template: str | None) -> None:
        tokenizer = make_tokenizer(template, pad_is_eos=True)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        row = row_of(tokenizer, {"prompt": "q", "completion": "a"})
        end = row.turn_end - 1
        assert row.labels[end] == row.input_ids[end] == tokenizer.eos_token_id

    def test_eos_is_not_doubled(self) -> None:
        tokenizer = make_tokenizer()
        for fields in ({"text": "the film</s>"}, {"prompt": "the", "completion": " film</s>"}):
            assert row_of(tokenizer, fields).input_ids.count(tokenizer.eos_token_id) == 1

    def test_an_empty_completion_teaches_to_stop(self) -> None:
        tokenizer = make_tokenizer()
        for prompt in ("the film", "the film</s>"):
            assert learnt(tokenizer, row_of(tokenizer, {"prompt": prompt, "completion": ""})) == "</s>"

    def test_text_rows_are_learnt_but_for_their_first_token(self) -> None:
        row = row_of(make_tokenizer(adds_bos=True), {"text": "the film"})
        assert row.labels == [IGNORE, *row.input_ids[1:]]
        assert row.prompt_len is None and row.prompt_ids() == []

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_an_empty_text_teaches_nothing(self, adds_bos: bool) -> None:
        assert row_of(make_tokenizer(adds_bos=adds_bos), {"text": ""}).supervised_tokens == 0


class TestBoundary:
    """Tokens before a completion are those that the model is given when it is asked for it."""

    @pytest.mark.parametrize("spaces", [False, True])
    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [("the film: ", "yes"), ("the film:", " yes"), ("film\n", "\nyes"), ("the fi", "lm"), ("a ", " b")],
    )
    def test_a_token_never_spans_it(self, spaces: bool, prompt: str, completion: str) -> None:
        tokenizer = make_tokenizer(adds_bos=True, spaces=spaces)
        row = row_of(tokenizer, {"prompt": prompt, "completion": completion})
        assert row.prompt_ids() == tokenizer(prompt)["input_ids"] == encode_prompt(prompt, tokenizer)
        assert whole(tokenizer, row).removeprefix("<s>").strip() == (prompt + completion + "</s>").strip()
        assert learnt(tokenizer, row) == completion + "</s>"

    @given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12))
    def test_prompt_and_completion_are_tokenised_apart(self, prompt: str, completion: str) -> None:
        row = ENCODER.encode([RawRow({"prompt": prompt, "completion": completion})])[0]
        prompt_ids, answer_ids = TOKENIZER([prompt, completion], add_special_tokens=False)["input_ids"]
        assert row.input_ids == [*prompt_ids, *answer_ids, TOKENIZER.eos_token_id]
        assert row.labels[1:] == ([IGNORE] * len(prompt_ids) + row.completion_ids())[1:]

    def test_chat_prompts_are_those_of_generation(self) -> None:
        for source in (*made.SHAPES.values(), made.OPEN_THOUGHT, made.SYSTEM_LAST, made.PLAIN):
            tokenizer = make_tokenizer(source, adds_bos=True)
            messages = turns("q1", "a1", "q2", "\n a2", system="sys")
            row = row_of(tokenizer, {"messages": messages})
            assert row.prompt_ids() == encode_prompt(messages[:-1], tokenizer)
        assert encode_prompt("q", tokenizer) == encode_prompt(turns("q"), tokenizer)


def test_a_tokenizer_without_offsets_serves_as_well() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    row = row_of(tokenizer, {"prompt": "the film: ", "completion": "yes"})
    assert preview([row], tokenizer)[0] == [("the film: ", False), ("yes</s>", True)]
    tokenizer.chat_template = made.PLAIN
    row = row_of(tokenizer, {"messages": turns("q1", "a1", "q2", "a2")})
    assert learnt(tokenizer, row) == "a1a2</s>"
    assert whole(tokenizer, row) == "### user\nq1\n### assistant\na1\n### user\nq2\n### assistant\na2</s>"


class TestLength:
    def test_long_rows_are_cut_at_the_end(self) -> None:
        tokenizer = make_tokenizer(made.CHATML)
        fields = {"prompt": "q", "completion": "the film was good, " * 20}
        full, cut = row_of(tokenizer, fields), row_of(tokenizer, fields, seq_len=20)
        assert (full.truncated, cut.truncated) == (False, True)
        assert cut.input_ids == full.input_ids[:20] and cut.labels == full.labels[:20]
        assert cut.answer_end == cut.turn_end == 20

    def test_a_cut_through_the_prompt_leaves_nothing_to_learn(self) -> None:
        row = row_of(make_tokenizer(made.CHATML), {"prompt": "the film " * 50, "completion": "a"}, seq_len=20)
        assert row.truncated and row.supervised_tokens == 0 and row.completion_ids() == []

    def test_the_last_turn_that_is_left_is_the_completion(self) -> None:
        tokenizer = make_tokenizer(made.CHATML)
        row = row_of(tokenizer, {"messages": turns("q1", "a1", "the film " * 50, "a2")}, seq_len=40)
        assert row.completion_text(tokenizer) == "a1"

    def test_a_row_of_exactly_seq_len_is_whole(self) -> None:
        tokenizer = make_tokenizer()
        fields = {"prompt": "the", "completion": "film"}
        size = len(row_of(tokenizer, fields).input_ids)
        assert not row_of(tokenizer, fields, seq_len=size).truncated
        assert row_of(tokenizer, fields, seq_len=size - 1).truncated


class TestEvaluation:
    @pytest.mark.parametrize("shape", ["chatml", "marked short", "llama", "eos last"])
    def test_the_completion_is_the_last_answer_without_its_end(self, shape: str) -> None:
        tokenizer = make_tokenizer(made.SHAPES[shape])
        row = row_of(tokenizer, {"messages": turns("q1", "a1", "q2", "the answer")})
        assert row.completion_text(tokenizer) == "the answer"
        assert row.prompt_ids() + row.completion_ids() == row.input_ids[: row.turn_end]
        assert len(row.completion_ids()) > row.answer_end - row.prompt_len

    def test_a_final_line_end_of_the_answer_is_kept(self) -> None:
        tokenizer = make_tokenizer(made.CHATML)
        assert row_of(tokenizer, {"prompt": "q", "completion": "a\n"}).completion_text(tokenizer) == "a\n"

    def test_labels_on_all_tokens_leave_the_completion_known(self) -> None:
        tokenizer = make_tokenizer(made.CHATML)
        fields = {"prompt": "q", "completion": "the answer"}
        row = row_of(tokenizer, fields, train_on="all")
        assert row.labels == [IGNORE, *row.input_ids[1:]]
        assert row.completion_ids() == row_of(tokenizer, fields).completion_ids()
        assert row.completion_text(tokenizer) == "the answer"


def test_many_rows_encode_as_each_alone() -> None:
    tokenizer = make_tokenizer(made.THINKING, adds_bos=True)
    raws = [RawRow({"messages": turns(*[f"film {n}"] * n)}, f"f:{n}") for n in range(1, 9)]
    encoder = Encoder(tokenizer, seq_len=40)
    assert encoder.encode(raws) == [encode(raw, tokenizer, seq_len=40) for raw in raws]
    assert encoder.encode([]) == []


def test_preview_shows_special_tokens_and_whole_characters() -> None:
    tokenizer = make_tokenizer(made.CHATML)
    rows = [row_of(tokenizer, {"prompt": "é🙂", "completion": "日本"})] * 5
    shown = preview(rows, tokenizer)
    assert len(shown) == 3
    assert shown[0] == [
        ("<|im_start|>user\né🙂<|im_end|>\n<|im_start|>assistant\n", False),
        ("日本<|im_end|>", True),
        ("\n", False),
    ]


def test_the_real_smollm2_tokenizer(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = turns("Is this film good?\n", "Yes, it is.", "Sure?", " Quite.")
    row = row_of(tokenizer, {"messages": messages})
    assert row.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert learnt(tokenizer, row) == "Yes, it is.<|im_end|> Quite.<|im_end|>"
    assert whole(tokenizer, row).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
