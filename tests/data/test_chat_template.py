"""Which part of a conversation is learnt, under templates shaped like those of the real model families."""

from __future__ import annotations

from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data.chat_template import ChatTemplate
from qrosa.data.formats import Conversation
from qrosa.errors import InputError


def learnt(template: str, messages: list[dict[str, Any]], first: int = 0) -> tuple[list[str], int]:
    """The learnt pieces of text, and how many turns could not be learnt."""
    rendered = ChatTemplate(make_tokenizer(template)).render(Conversation(messages, first), "f:1")
    return [rendered.text[start:end] for start, end in rendered.spans], rendered.skipped


@pytest.mark.parametrize("shape", ["chatml", "default system", "marked", "marked short"])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_every_answer_is_learnt_with_the_token_that_ends_it(shape: str, system: str | None) -> None:
    messages = turns("q1", "a1", "q2", "a2\n", system=system)
    assert learnt(made.SHAPES[shape], messages) == (["a1<|im_end|>", "a2\n<|im_end|>"], 0)


def test_trimmed_answers_and_bos_in_the_template() -> None:
    assert learnt(made.LLAMA, turns("q1", " a1 ", "q2", "a2")) == (["a1<|eot|>", "a2<|eot|>"], 0)


def test_a_last_turn_that_the_template_ends_twice() -> None:
    assert learnt(made.EOS_LAST, turns("q1", "a1", "q2", "a2")) == (["a1<|eot|>", "a2<|eot|>\n</s>"], 0)


def test_answers_of_a_prompt_are_context() -> None:
    for shape in made.SHAPES:
        pieces, skipped = learnt(made.SHAPES[shape], turns("q1", "a1", "q2", "a2"), first=2)
        assert len(pieces) == 1 and "a2" in pieces[0] and skipped == 0, shape


def test_a_conversation_that_ends_with_a_question() -> None:
    assert learnt(made.CHATML, turns("q1", "a1", "q2")) == (["a1<|im_end|>"], 0)
    assert learnt(made.CHATML, turns("q1")) == ([], 0)


def test_a_conversation_that_starts_with_an_answer() -> None:
    """No prompt asks for the first answer, so it cannot be learnt."""
    messages = [{"role": "assistant", "content": "hello"}, *turns("q1", "a1")]
    assert learnt(made.CHATML, messages) == (["a1<|im_end|>"], 1)


class TestRewrittenTurns:
    """Templates that write a turn differently once it is history."""

    def test_dropped_thinking_is_not_unlearnt(self) -> None:
        thought = "<think>\nhm\n</think>\n\n"
        pieces, skipped = learnt(made.THINKING, turns("q1", thought + "a1", "q2", thought + "a2"))
        assert (pieces, skipped) == ([thought + "a2<|im_end|>"], 1)

    def test_turns_that_keep_their_text_are_learnt(self) -> None:
        pieces, skipped = learnt(made.THINKING, turns("q1", "a1", "q2", "a2"))
        assert (pieces, skipped) == (["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"], 0)

    def test_an_answer_is_not_mistaken_for_later_text(self) -> None:
        """The dropped thought of the first turn stands, word for word, in the next question."""
        messages = turns("q1", "<think>\nhm\n</think>\n\na1", "<think>\nhm\n</think>\n\na1", "a2")
        assert learnt(made.THINKING, messages) == (["<think>\n\n</think>\n\na2<|im_end|>"], 1)

    def test_a_system_prompt_that_moves_to_the_last_question(self) -> None:
        """The text is what the model will be given: with the system prompt."""
        template = ChatTemplate(make_tokenizer(made.SYSTEM_LAST))
        rendered = template.render(Conversation(turns("q1", "s", "q2", "s", system="sys")), "f:1")
        assert rendered.text == "<s>[INST]q1[/INST] s</s>[INST]sys\n\nq2[/INST] s</s>"
        assert [rendered.text[a:b] for a, b in rendered.spans] == [" s</s>"]
        assert rendered.spans[0][1] == len(rendered.text)
        assert rendered.skipped == 1
        assert learnt(made.SYSTEM_LAST, turns("q1", "a1", "q2", "a2")) == ([" a1</s>", " a2</s>"], 0)

    def test_a_generation_prompt_that_opens_a_thought(self) -> None:
        template = ChatTemplate(make_tokenizer(made.OPEN_THOUGHT))
        rendered = template.render(Conversation(turns("q", "a")), "f:1")
        asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert rendered.text == asked + "\n</think>\n\na<|im_end|>\n"
        assert learnt(made.OPEN_THOUGHT, turns("q", "<think>\nhm\n</think>a")) == (["hm\n</think>a<|im_end|>"], 0)


def test_the_learnt_part_starts_where_the_model_is_asked() -> None:
    """Whatever the template, the text before the last answer is what asks for it."""
    templates = {**made.SHAPES, "open": made.OPEN_THOUGHT, "system last": made.SYSTEM_LAST, "plain": made.PLAIN}
    for shape, source in templates.items():
        for system in (None, "sys"):
            template = ChatTemplate(make_tokenizer(source))
            messages = turns("q1", "a1", "q2", "a2", system=system)
            rendered = template.render(Conversation(messages), "f:1")
            asked = template.prompt(Conversation(messages[:-1]), "f:1")
            assert rendered.text[: rendered.spans[-1][0]] == asked, shape


def test_eos_is_added_where_no_token_ends_a_turn() -> None:
    rendered = ChatTemplate(make_tokenizer(made.PLAIN)).render(Conversation(turns("q", "a")), "f:1")
    assert rendered.add_eos and rendered.text == "### user\nq\n### assistant\na"
    open_end = ChatTemplate(make_tokenizer(made.PLAIN)).render(Conversation(turns("q", "a", "q2")), "f:1")
    assert not open_end.add_eos


def test_a_marked_template_without_an_end_token_gets_eos() -> None:
    source = made.CHATML_MARKED.replace("<|im_end|>", "")
    rendered = ChatTemplate(make_tokenizer(source)).render(Conversation(turns("q", "a")), "f:1")
    assert rendered.add_eos and rendered.text.endswith("assistant\na")


def test_what_a_template_refuses_is_an_input_error() -> None:
    template = ChatTemplate(make_tokenizer(made.SYSTEM_LAST))
    with pytest.raises(InputError, match=r"f:9: .*roles must alternate"):
        template.render(Conversation([{"role": "user", "content": "a"}] * 2), "f:9")
    with pytest.raises(InputError, match=r"f:9: .*template refuses"):
        template.prompt(Conversation([]), "f:9")


def test_tools_reach_the_template() -> None:
    source = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + made.CHATML
    rendered = ChatTemplate(make_tokenizer(source)).render(Conversation(turns("q", "a"), tools=[{"name": "f"}]), "f:1")
    assert rendered.text.startswith("f<|im_start|>")


def test_the_clock_of_a_template_stands_still() -> None:
    rendered = ChatTemplate(make_tokenizer(made.LLAMA)).render(Conversation(turns("q", "a")), "f:1")
    assert "Today Date: 26 Jul 2024<|eot|>" in rendered.text
