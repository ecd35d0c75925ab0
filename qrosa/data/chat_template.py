"""Which characters of a rendered conversation are the assistant's: the part that is learnt.

A template may mark them itself (``{% generation %}``); few do. Otherwise they are found **by prefix**: the
conversation up to an assistant turn, rendered with the generation prompt, is what the model is given when it is asked
for that turn. Where the rendering of the whole conversation starts with exactly that text, the turn begins right
behind it, and ends where the rendering up to and with the turn ends. This needs no knowledge of any template, and
takes default system prompts (SmolLM2, Qwen2.5), trimming and headers in its stride.

Some templates write a turn differently once it is history, and prefixes then do not meet:

- The turn itself is rewritten (Qwen3 drops the thinking of earlier turns). It is learnt only if all of its message's
  text is still there; to learn an answer without the thinking that led to it would undo the thinking.
- The text before the turn is rewritten (Mistral's put the system prompt into the *last* user turn; DeepSeek-R1's
  generation prompt opens a thinking block that history does not have). Then the model never sees this text before this
  turn, so the turn is not learnt in this row - except the last one: the row becomes its prompt, as the model will
  be given it, and its answer.

A turn that is not learnt is counted (``skipped``), never guessed at.

Some templates (Llama 3, gpt-oss) write today's date. Here the clock stands still: the same rows must give the same
tokens tomorrow, or a run could not be resumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.data.formats import Conversation, Message
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "stand-in for the answer"
# Shadows the function of the same name that transformers gives to templates; the date is Llama 3's own default.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{% if format == '%Y-%m-%d' %}2024-07-26{% else %}26 Jul 2024{% endif %}{% endmacro %}"
)


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: What is tokenised.
        spans: Character ranges of ``text`` that are learnt, ascending, none empty.
        add_bos: Whether BOS goes before it, if the tokenizer adds one.
        add_eos: Whether EOS goes behind it.
        skipped: Assistant turns that should have been learnt and could not be.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_bos: bool = False
    add_eos: bool = False
    skipped: int = 0


class ChatTemplate:
    """A tokenizer's chat template, and what is known of how it ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._closing = self._find_closing()

    def prompt(self, conversation: Conversation, where: str) -> str:
        """The text that asks for the next assistant turn.

        Raises:
            InputError: The template does not take these messages.
        """
        return self._render(conversation.messages, conversation.tools, where, ask=True)

    def render(self, conversation: Conversation, where: str) -> Rendered:
        """The whole conversation with its learnt spans.

        Raises:
            InputError: The template does not take these messages.
        """
        turns = _assistant_turns(conversation)
        if turns and _MARKERS.search(self._source(conversation.tools)):
            marked = self._render_marked(conversation, where)
            if marked.spans:
                return marked
        return self._render_by_prefix(conversation, turns, where)

    def _render_by_prefix(self, conversation: Conversation, turns: list[int], where: str) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        text = self._render(messages, tools, where)
        skipped = 0
        spans: list[tuple[int, int]] = []
        for turn in turns:
            prompt = self._try_render(messages[:turn], tools, ask=True)
            is_last = turn == len(messages) - 1
            if is_last and prompt is not None and not text.startswith(prompt):
                moved = self._behind_own_prompt(text, prompt, messages[turn])
                if moved is not None:
                    skipped, spans, text = len(turns) - 1, [], moved
            span = self._turn_span(text, prompt, conversation, turn) if prompt is not None else None
            if span is None:
                skipped += 1
            else:
                spans.append(span)
        # A template that closes turns with plain text leaves the model without a token to stop at.
        unclosed = bool(spans) and not self._closing and turns[-1] == len(messages) - 1
        if unclosed:
            text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), add_eos=unclosed, skipped=skipped)

    def _turn_span(self, text: str, prompt: str, conversation: Conversation, turn: int) -> tuple[int, int] | None:
        """Where turn number ``turn``, asked for by ``prompt``, stands in ``text``; None where that is not certain."""
        if not text.startswith(prompt):
            return None
        messages = conversation.messages
        if turn == len(messages) - 1:
            end: int | None = len(text.rstrip())
        else:
            history = self._try_render(messages[: turn + 1], conversation.tools)
            if history is not None and text.startswith(history):
                end = len(history.rstrip())
            else:
                end = self._rewritten_end(text, len(prompt), conversation, turn)
        return (len(prompt), end) if end is not None and end > len(prompt) else None

    def _rewritten_end(self, text: str, start: int, conversation: Conversation, turn: int) -> int | None:
        """The end of a turn that the template rewrote, if it kept all of the message's text.

        The next message's text, replaced by a stand-in, shows how far the turn can reach at most.
        """
        stop = self._closing.strip()
        messages = list(conversation.messages)
        messages[turn + 1] = {**messages[turn + 1], "content": _STAND_IN}
        probe = self._try_render(messages, conversation.tools)
        limit = probe.find(_STAND_IN, start) if probe is not None else -1
        if not stop or limit < 0:
            return None
        at = text.find(stop, start, limit)
        if at < 0 or any(part.strip() not in text[start:at] for part in _texts(conversation.messages[turn])):
            return None
        return at + len(stop)

    def _behind_own_prompt(self, text: str, prompt: str, message: Message) -> str | None:
        """The prompt of the last turn as the model will be given it, and the turn as the template wrote it."""
        content, stop = str(message.get("content", "")).strip(), self._closing.strip()
        at = text.rfind(content, 0, text.rfind(stop)) if content else -1
        if at < 0:
            return None
        if not prompt[-1:].isspace():
            at = len(text[:at].rstrip())
        return prompt + text[at:]

    def _render_marked(self, conversation: Conversation, where: str) -> Rendered:
        """Spans by the template's own markers, each taken on through the token that ends the turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"chat_template": self._source(conversation.tools), "tools": conversation.tools}
        options.update(self._tokenizer.special_tokens_map)
        try:
            rendered: Any = render_jinja_template(
                [conversation.messages], return_assistant_tokens_mask=True, **options
            )  # annotated as text, in fact a pair: texts, character ranges
        except Exception as error:  # whatever a template's own code raises
            raise _refused(error, where) from None
        [text], [marks] = rendered
        first = 0
        if conversation.first:  # answers inside a prompt are context
            context = self._try_render(conversation.messages[: conversation.first], conversation.tools)
            first = _common_length(context or "", text)
        spans: list[tuple[int, int]] = []
        for start, end in marks:
            if self._closing and text.startswith(self._closing, end):
                end += len(self._closing)
            if start < first or end <= start:
                continue
            if spans and spans[-1][1] >= start:
                start = spans.pop()[0]
            spans.append((start, end))
        last_is_open = conversation.messages[-1]["role"] == "assistant" and not self._closing
        if last_is_open and spans:
            text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), add_eos=bool(last_is_open and spans))

    def _find_closing(self) -> str:
        """What the template writes behind an answer, through its first special token: ``<|im_end|>``, `` </s>``.

        Empty if it writes none. A template that refuses even the plainest conversation is taken to write EOS.
        """
        eos = str(self._tokenizer.eos_token or "")
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _STAND_IN}]
        text = self._try_render(messages, None)
        if text is None or _STAND_IN not in text:
            return eos
        tail = text[text.rindex(_STAND_IN) + len(_STAND_IN) :]
        tokens = {str(token) for token in self._tokenizer.added_tokens_decoder.values()} | {eos}
        ends = [tail.find(token) + len(token) for token in tokens if token.strip() and token in tail]
        return tail[: min(ends)] if ends else ""

    def _source(self, tools: list[Any] | None) -> str:
        try:
            source = self._tokenizer.get_chat_template(None, tools)
        except ValueError:
            message = "the model's tokenizer has several chat templates, none of them the default"
            raise InputError(message, "name one of them 'default' in its tokenizer_config.json") from None
        return _FIXED_DATE + source if "strftime_now" in source else source

    def _try_render(self, messages: list[Message], tools: list[Any] | None, ask: bool = False) -> str | None:
        """None where the template refuses: part of a conversation may be none to it."""
        try:
            return self._render(messages, tools, "", ask)
        except InputError:
            return None

    def _render(self, messages: list[Message], tools: list[Any] | None, where: str, ask: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools, chat_template=self._source(tools), tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # whatever a template's own code raises
            raise _refused(error, where) from None
        return str(text)


def _refused(error: Exception, where: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    message = f"{where}: the model's chat template refuses this conversation: {reason}"
    return InputError(message, "check the roles and their order (most templates want user and assistant in turn)")


def _assistant_turns(conversation: Conversation) -> list[int]:
    messages = conversation.messages
    return [i for i in range(conversation.first, len(messages)) if messages[i]["role"] == "assistant"]


def _texts(message: Message) -> list[str]:
    return [value for key, value in message.items() if key != "role" and isinstance(value, str)]


def _common_length(left: str, right: str) -> int:
    """Characters that two texts share at their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
