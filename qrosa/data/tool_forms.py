"""The form in which a chat template takes the arguments of a tool call: an object, or the same as JSON text.

The interface that most data comes from writes arguments as text (``"{\\"city\\": \\"Oslo\\"}"``). Most templates
write an object as JSON themselves and would put such a text into quotes once more; some (DeepSeek V3) only join texts.
Which form a template takes is found by showing it both.
"""

from __future__ import annotations

import json
from typing import Any

from qrosa.data.messages import Message
from qrosa.data.rendering import Renderer
from qrosa.errors import InputError

_PROBE = {"qrosa_key": "value"}
_TEXT = json.dumps(_PROBE)


def takes_text(renderer: Renderer, tools: list[Any] | None) -> bool:
    """Whether a template needs arguments as JSON text; False where it takes objects, or takes neither."""
    as_object, as_text = (_shown(renderer, tools, form) for form in (_PROBE, _TEXT))
    bare = _TEXT.strip("{}")
    if as_object is not None and (bare in as_object or bare.replace(" ", "") in as_object):
        return False
    if as_text is not None and bare in as_text:
        return True
    return as_object is None and as_text is not None


def without_content(renderer: Renderer, tools: list[Any] | None, *, as_text: bool) -> Message:
    """What a message that only calls tools holds for its content: nothing, null or an empty text.

    Some templates fail where the key is missing, some write a null as ``None``. The first form that does neither is
    taken; where all fail, the template will say so of the row itself.
    """
    forms: tuple[Message, ...] = ({}, {"content": None}, {"content": ""})
    arguments: Any = _TEXT if as_text else _PROBE
    for form in forms:
        text = _shown(renderer, tools, arguments, form)
        if text is not None and "None" not in text:
            return form
    return {}


def with_arguments(message: Message, *, as_text: bool, where: str) -> Message:
    """The message with the arguments of its tool calls in the form that the template takes.

    Raises:
        InputError: A text that holds no JSON object, for a template that takes objects.
    """
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not as_text:
            arguments = _read(arguments, where)
        elif not isinstance(arguments, str) and as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _shown(renderer: Renderer, tools: list[Any] | None, arguments: Any, content: Message | None = None) -> str | None:
    call = {"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": arguments}}
    messages: list[Message] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", **({"content": ""} if content is None else content), "tool_calls": [call]},
    ]
    return renderer.attempt(messages, tools)


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        message = f"{where}: the arguments of a tool call are a text that is no JSON object: {text[:80]!r}"
        raise InputError(message, 'write them as an object, such as {"city": "Oslo"}')
    return value
