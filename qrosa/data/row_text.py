"""A row as text, and the ranges of it that are learnt.

Where the tokenizer has a chat template, every kind of row but ``text`` goes through it: chat rows as they are,
prompt/completion and Alpaca rows as one user and one assistant turn. Without one, prompt and completion are joined as
they are, Alpaca rows wear Stanford's fixed frame (:data:`ALPACA`), and chat rows are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrosa.data.chat_template import ChatTemplate
from qrosa.data.formats import Completion, Conversation, RawRow, Text
from qrosa.data.notes import Notes
from qrosa.data.rendering import Rendered
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class RowText:
    """Writes rows as text for one tokenizer.

    Args:
        tokenizer: With or without a chat template.
        train_on: ``completion``, ``last`` or ``all``.
        notes: Takes empty answers, and turns that cannot be learnt.

    Attributes:
        chat: The chat template, None where there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, notes: Notes) -> None:
        self.chat = ChatTemplate(tokenizer, notes) if tokenizer.chat_template else None
        self._train_on = train_on
        self._notes = notes

    def render(self, raw: RawRow) -> Rendered:
        """The row's text and the ranges of it that are learnt.

        Raises:
            InputError: A malformed row, or one that the chat template refuses.
        """
        example = raw.example()
        if isinstance(example, Text):
            spans = ((0, len(example.text)),) if example.text else ()  # nothing to learn in an empty text
            return Rendered(example.text, spans, add_bos=True, add_eos=True)
        if isinstance(example, Completion) and self.chat is None:
            return self._render_plain(example, raw.where)
        conversation = example if isinstance(example, Conversation) else example.conversation
        self._look_at_answers(conversation, raw.where)
        rendered = self.template(raw.where).render(conversation, raw.where, last=self._train_on == "last")
        if rendered.skipped:
            why = "the chat template does not write them so that the model could be asked for them"
            self._notes.add("answers not learnt", why, raw.where, count=rendered.skipped, unit="turns")
        return rendered

    def _render_plain(self, example: Completion, where: str) -> Rendered:
        if example.before:
            message = f"{where}: the row has a system text or earlier turns, and the model's tokenizer no chat template"
            raise InputError(message, "give a template with --chat-template, or put the text into the prompt")
        if not example.completion:
            self._notes.add("empty answers", "they teach the model to say nothing and stop", where)
        prompt = _plain_prompt(example)
        text = prompt + example.completion
        return Rendered(text, ((len(prompt), len(text)),), add_bos=True, add_eos=True)

    def _look_at_answers(self, conversation: Conversation, where: str) -> None:
        """Note empty answers, and refuse marks that ``--train-on all`` would override."""
        for index in conversation.answers:
            message = conversation.messages[index]
            if not str(message.get("content") or "").strip() and "tool_calls" not in message:
                self._notes.add("empty answers", "they teach the model to say nothing and stop", where, unit="turns")
        if self._train_on == "all" and conversation.context:
            what = f"{where}: a message is marked as not to be learnt, and --train-on all learns every token"
            raise InputError(what, "use --train-on completion or last, or drop the marks")

    def template(self, where: str) -> ChatTemplate:
        """The chat template.

        Raises:
            InputError: There is none.
        """
        if self.chat is None:
            hint = "give one with --chat-template FILE, or use prompt/completion, Alpaca or text rows"
            raise InputError(f"{where}: chat messages, but the model's tokenizer has no chat template", hint)
        return self.chat


def _plain_prompt(example: Completion) -> str:
    if example.alpaca is None:
        return example.prompt
    instruction, extra = example.alpaca
    frame = ALPACA_WITH_INPUT if extra.strip() else ALPACA
    return frame.format(instruction=instruction, input=extra)
