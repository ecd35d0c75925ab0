"""What a model thinks before it answers: where rows and templates write it, and how an answer is put together.

Rows hold a thought in the content, between ``<think>`` and ``</think>``, or under ``reasoning_content``. Templates
differ in three ways: some read the key, some only know the tags in the content, some know nothing of thoughts. Many
drop the thoughts of a conversation's history, and some open the thought themselves where they ask for an answer. What
is learnt must be what the model will be asked to say: the prompt as it will be given, and behind it the thought, the
tag that closes it and the answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qrosa.data.messages import THOUGHT_KEYS, Message

KEY = "reasoning_content"
_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)


@dataclass(frozen=True)
class Style:
    """How a template writes thoughts.

    Attributes:
        keys: The keys of a message under which it reads a thought; empty where it reads none.
        tags: The tags that it knows, (open, close); None where it knows none.
    """

    keys: tuple[str, ...] = ()
    tags: tuple[str, str] | None = None

    @classmethod
    def of(cls, source: str, names: Collection[str]) -> Style:
        """The style of a template, by its text and the names that it mentions."""
        keys = tuple(key for key in THOUGHT_KEYS if key in names)
        return cls(keys, next((tags for tags in _TAGS if tags[0] in source or tags[1] in source), None))

    def put(self, message: Message) -> Message:
        """The message with its thought where the template reads it; unchanged where there is no such place."""
        thought = message.get(KEY)
        if thought is None:
            return message
        rest = {key: value for key, value in message.items() if key != KEY}
        if self.keys:
            return {**rest, **dict.fromkeys(self.keys, thought)}
        if self.tags is None:
            return message
        content = str(rest.get("content") or "")
        return {**rest, "content": f"{closed(thought, self.tags)}{content.lstrip()}"}


def closed(thought: str, tags: tuple[str, str]) -> str:
    """A thought between its tags, as templates write it, up to where the answer begins."""
    return f"{tags[0]}\n{thought.strip()}\n{tags[1]}\n\n"


def split(message: Message) -> tuple[str | None, str]:
    """What a message holds as (thought, answer), neither stripped; None where it holds no thought."""
    content = str(message.get("content") or "")
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str):
            return str(message[key]), content
    for opening, closing in _TAGS:
        if closing in content:
            head, _, answer = content.rpartition(closing)
            return head.lstrip().removeprefix(opening), answer
    return None, content


def opened(prompt: str) -> tuple[str, tuple[str, str]] | None:
    """Where a prompt ends in an open thought: the prompt before it, and its tags."""
    bare = prompt.rstrip()
    for tags in _TAGS:
        if bare.endswith(tags[0]):
            return bare.removesuffix(tags[0]), tags
    return None


def behind(prompt: str, message: Message, answer: str, style: Style) -> str | None:
    """What the model is to say behind ``prompt``: its thought, the tag that closes it, the answer.

    Args:
        prompt: What asks for the answer, as the model will be given it.
        message: The assistant's message.
        answer: Its answer as the template wrote it, with what ends the turn.
        style: How the template writes thoughts.

    Returns:
        The text; None where the template leaves the thought no place.
    """
    thought, own = split(message)
    space = own[: len(own) - len(own.lstrip())] if thought is not None and not _keyed(message) else "\n\n"
    start = opened(prompt)
    if start is not None:
        answer, (_, tags) = answer.lstrip(), start
        lead = "" if prompt[-1].isspace() else "\n"
        if thought is None or not thought.strip():
            return f"{lead}\n{tags[1]}\n\n{answer}"
        told = thought.lstrip() if lead == "" else f"{lead}{thought.lstrip()}"
        end = "" if told.endswith("\n") or not _keyed(message) else "\n"
        return f"{told}{end}{tags[1]}{space}{answer}"
    if thought is None or not thought.strip():
        return answer
    if style.tags is None or prompt.rstrip().endswith(style.tags[1]):
        return None
    inner = f"\n{thought.strip()}\n" if _keyed(message) else thought
    return f"{style.tags[0]}{inner}{style.tags[1]}{space}{answer.lstrip()}"


def _keyed(message: Message) -> bool:
    return any(key in message for key in THOUGHT_KEYS)
