"""Templates that mark the assistant's part themselves (``{% generation %}``): their marks, turn by turn."""

from __future__ import annotations

import re

from qrosa.data.formats import Conversation
from qrosa.data.rendering import Rendered, Renderer

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_markers(source: str) -> bool:
    """Whether a template marks what the assistant says."""
    return _MARKERS.search(source) is not None


def render_marked(
    renderer: Renderer, conversation: Conversation, turns: list[int], where: str, closing: str
) -> Rendered | None:
    """Spans by the template's own markers, each taken on through the token that ends the turn.

    Args:
        renderer: Of the template.
        conversation: The row.
        turns: The answers that are to be learnt.
        where: The row's place.
        closing: What the template writes behind an answer.

    Returns:
        None where the markers cannot be told apart by turn, and not all turns are to be learnt.

    Raises:
        InputError: The template does not take these messages.
    """
    text, marks = renderer.render_marked(conversation.messages, conversation.tools, where)
    everyone = conversation.assistants
    if len(marks) == len(everyone):
        marked = [(turn, mark) for turn, mark in zip(everyone, marks, strict=True) if turn in turns]
        marks = [_from_prompt(renderer, text, mark, conversation, turn) for turn, mark in marked]
    elif turns != everyone:
        return None
    spans: list[tuple[int, int]] = []
    for start, end in marks:
        if closing and text.startswith(closing, end):
            end += len(closing)
        if end <= start:
            continue
        if spans and spans[-1][1] >= start:
            start = spans.pop()[0]
        spans.append((start, end))
    if not spans:
        return None
    last_is_open = conversation.messages[-1]["role"] == "assistant" and not closing
    if last_is_open:
        text = text[: spans[-1][1]]
    return Rendered(text, tuple(spans), add_eos=last_is_open)


def _from_prompt(
    renderer: Renderer, text: str, mark: tuple[int, int], conversation: Conversation, turn: int
) -> tuple[int, int]:
    """A marked range without what the generation prompt gives already (a line end behind ``assistant``)."""
    start, end = mark
    prompt = renderer.attempt(conversation.messages[:turn], conversation.tools, ask=True)
    if prompt is not None and start < len(prompt) <= end and text.startswith(prompt):
        start = len(prompt)
    return start, end
