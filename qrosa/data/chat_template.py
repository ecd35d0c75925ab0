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
  be given it, and behind it the thought, if there is one, and the answer (:mod:`qrosa.data.thoughts`).

A turn that is not learnt is counted (``skipped``), never guessed at. A message that the template leaves out, or tools
that it does not know, would change what the conversation says: such rows are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qrosa.data import thoughts, tool_forms
from qrosa.data.formats import Conversation
from qrosa.data.markers import has_markers, render_marked
from qrosa.data.messages import Message
from qrosa.data.notes import Notes
from qrosa.data.rendering import Rendered, Renderer
from qrosa.data.thoughts import Style
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "stand-in for the answer"
_OTHER = "give another template with --chat-template"


@dataclass(frozen=True)
class _Ways:
    """What is known of a template: the names that it mentions, its way with thoughts and with calls of tools."""

    names: frozenset[str]
    style: Style
    text_arguments: bool
    no_content: Message


class ChatTemplate:
    """A tokenizer's chat template, and what is known of how it ends a turn.

    Args:
        tokenizer: With a chat template.
        notes: Takes the message keys that the template does not read.

    Raises:
        InputError: The template is no sound jinja, or cannot be run within bounds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, notes: Notes | None = None) -> None:
        self._tokenizer = tokenizer
        self._notes = Notes() if notes is None else notes
        self._renderer = Renderer(tokenizer)
        self._known: dict[bool, _Ways] = {}
        self._kept: set[tuple[str, bool]] = set()
        self.closing = self._find_closing()

    def prompt(self, conversation: Conversation, where: str) -> str:
        """The text that asks for the next assistant turn.

        Raises:
            InputError: The template does not take these messages.
        """
        conversation = self._adapt(conversation, where)
        return self._renderer.render(conversation.messages, conversation.tools, where, ask=True)

    def render(self, conversation: Conversation, where: str, *, last: bool = False) -> Rendered:
        """The whole conversation with its learnt spans.

        Args:
            conversation: The row.
            where: Its place.
            last: Learn the last of its answers only.

        Raises:
            InputError: The template does not take these messages, or leaves some of them out.
        """
        conversation = self._adapt(conversation, where)
        turns = conversation.answers
        if last:
            turns = [turn for turn in turns if turn == conversation.assistants[-1]]
        marked = None
        if turns and has_markers(self._renderer.source(conversation.tools)):
            marked = render_marked(self._renderer, conversation, turns, where, self.closing)
        rendered = marked or self._render_by_prefix(conversation, turns, where)
        self._refuse_what_is_left_out(conversation, rendered.text, where)
        return rendered

    def _adapt(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation in the form that the template takes.

        Raises:
            InputError: Tools or calls that the template does not know.
        """
        ways = self._ways(conversation.tools)
        if conversation.tools and "tools" not in ways.names:
            raise InputError(f"{where}: the row has tools, and the model's chat template takes none", _OTHER)
        messages = []
        for message in conversation.messages:
            if "tool_calls" in message and "tool_calls" not in ways.names:
                raise InputError(
                    f"{where}: a message calls tools, and the model's chat template writes no calls", _OTHER
                )
            message = tool_forms.with_arguments(ways.style.put(message), as_text=ways.text_arguments, where=where)
            if "content" not in message:
                message = {**message, **ways.no_content}
            for key in message:
                if key not in ("role", "content") and key not in ways.names:
                    self._notes.add(
                        f"message key {key!r}", "the chat template does not read it", where, unit="messages"
                    )
            messages.append(message)
        return replace(conversation, messages=messages)

    def _ways(self, tools: list[Any] | None) -> _Ways:
        known = self._known.get(tools is not None)
        if known is None:
            names = self._renderer.names(tools)
            style = Style.of(self._renderer.source(tools), names)
            calls = "tool_calls" in names
            as_text = calls and tool_forms.takes_text(self._renderer, tools)
            no_content = tool_forms.without_content(self._renderer, tools, as_text=as_text) if calls else {}
            known = self._known[tools is not None] = _Ways(names, style, as_text, no_content)
        return known

    def _render_by_prefix(self, conversation: Conversation, turns: list[int], where: str) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        text = self._renderer.render(messages, tools, where)
        prompts = {turn: self._renderer.attempt(messages[:turn], tools, ask=True) for turn in turns}
        ends_with_answer = bool(turns) and turns[-1] == len(messages) - 1
        if ends_with_answer:
            text = self._as_asked(text, prompts[turns[-1]], conversation)
        found = [self._turn_span(text, prompts[turn], conversation, turn) for turn in turns]
        spans = [span for span in found if span is not None]
        # A template that closes turns with plain text leaves the model without a token to stop at.
        unclosed = ends_with_answer and bool(spans) and not self.closing
        if unclosed:
            text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), add_eos=unclosed, skipped=len(turns) - len(spans))

    def _as_asked(self, text: str, prompt: str | None, conversation: Conversation) -> str:
        """The text with its last turn as the model will be asked for it; ``text`` itself where it is so, or unclear."""
        message = conversation.messages[-1]
        if prompt is None or (text.startswith(prompt) and self._says_all(text[len(prompt) :], conversation, message)):
            return text
        answer = self._last_answer(text, prompt, conversation)
        if answer is None:
            return text
        learnt = thoughts.behind(prompt, message, answer, self._ways(conversation.tools).style)
        return text if learnt is None else prompt + learnt

    def _says_all(self, turn: str, conversation: Conversation, message: Message) -> bool:
        """Whether a rendered turn holds the message's thought, where the template knows thoughts at all."""
        style = self._ways(conversation.tools).style
        thought = thoughts.split(message)[0] if style.keys or style.tags else None
        return thought is None or thought.strip() in turn

    def _last_answer(self, text: str, prompt: str, conversation: Conversation) -> str | None:
        """The last turn's answer, its thought aside, as the template wrote it, through the end of the text."""
        messages = conversation.messages
        before = self._renderer.attempt(messages[:-1], conversation.tools)
        thought, content = thoughts.split(messages[-1])
        start = thoughts.opened(prompt)
        header = prompt if start is None else start[0]
        if before is not None and header.startswith(before) and text.startswith(header):
            answer = text[len(header) :]
            tags = self._ways(conversation.tools).style.tags
            return answer.rpartition(tags[1])[2] if thought is not None and tags is not None else answer
        stop = self.closing.strip()
        at = text.rfind(content.strip(), 0, text.rfind(stop)) if content.strip() else -1
        if at < 0:
            return None
        return text[at if prompt[-1:].isspace() else len(text[:at].rstrip()) :]

    def _turn_span(
        self, text: str, prompt: str | None, conversation: Conversation, turn: int
    ) -> tuple[int, int] | None:
        """Where turn number ``turn``, asked for by ``prompt``, stands in ``text``; None where that is not certain."""
        if prompt is None or not text.startswith(prompt):
            return None
        messages, start = conversation.messages, len(prompt)
        if turn == len(messages) - 1:
            end: int | None = len(text.rstrip())
        else:
            history = self._renderer.attempt(messages[: turn + 1], conversation.tools)
            if history is not None and text.startswith(history):
                end = len(history.rstrip())
            else:
                end = self._rewritten_end(text, start, conversation, turn)
        if end is None or end <= start or not self._says_all(text[start:end], conversation, messages[turn]):
            return None
        return start, end

    def _rewritten_end(self, text: str, start: int, conversation: Conversation, turn: int) -> int | None:
        """The end of a turn that the template rewrote, if it kept all of the message's text.

        The next message's text, replaced by a stand-in, shows how far the turn can reach at most.
        """
        stop = self.closing.strip()
        probe = self._with_stand_in(conversation, turn + 1)
        limit = probe.find(_STAND_IN, start) if probe is not None else -1
        if not stop or limit < 0:
            return None
        at = text.find(stop, start, limit)
        if at < 0 or any(part.strip() not in text[start:at] for part in _texts(conversation.messages[turn])):
            return None
        return at + len(stop)

    def _refuse_what_is_left_out(self, conversation: Conversation, text: str, where: str) -> None:
        """Every message's text must stand in the row, or what a stand-in shows the template to make of it."""
        for index, message in enumerate(conversation.messages):
            said = thoughts.split(message)[1].strip()
            key = (message["role"], index == 0)
            if not said or said in text or key in self._kept:
                continue
            probe = self._with_stand_in(conversation, index)
            if probe is not None and _STAND_IN not in probe:
                what = f"message {index + 1} of {len(conversation.messages)} (role {message['role']!r})"
                hint = f"use a role that the template writes, put the text into another message, or {_OTHER}"
                raise InputError(f"{where}: the model's chat template leaves out {what}", hint)
            self._kept.add(key)

    def _with_stand_in(self, conversation: Conversation, index: int) -> str | None:
        messages = list(conversation.messages)
        messages[index] = {**messages[index], "content": _STAND_IN}
        return self._renderer.attempt(messages, conversation.tools)

    def _find_closing(self) -> str:
        """What the template writes behind an answer, through its first special token: ``<|im_end|>``, `` </s>``.

        Empty if it writes none. A template that refuses even the plainest conversation is taken to write EOS.
        """
        eos = str(self._tokenizer.eos_token or "")
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _STAND_IN}]
        text = self._renderer.attempt(messages, None)
        if text is None or _STAND_IN not in text:
            return eos
        tail = text[text.rindex(_STAND_IN) + len(_STAND_IN) :]
        tokens = {str(token) for token in self._tokenizer.added_tokens_decoder.values()} | {eos}
        ends = [tail.find(token) + len(token) for token in tokens if token.strip() and token in tail]
        return tail[: min(ends)] if ends else ""


def _texts(message: Message) -> Sequence[str]:
    return [value for key, value in message.items() if key != "role" and isinstance(value, str)]
