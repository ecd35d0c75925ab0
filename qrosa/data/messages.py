"""Messages as rows write them, brought to one form: that of ``{"role", "content", ...}`` with plain text.

    {"from": "gpt", "value": "..."}                                ShareGPT's names             -> role, content
    {"content": [{"type": "text", "text": "..."}, ...]}            parts of text                -> one text
    {"content": [{"type": "thinking", ...}]}, reasoning, thinking                               -> reasoning_content
    {"tool_calls": "[...]"}, {"name", "arguments"}, function_call  forms of a tool call         -> tool_calls
    {"weight": 0}, {"train": false}, {"loss": false}, ...          marks of what is not learnt  -> :attr:`Turn.learn`

Nothing here depends on a chat template. Keys that are not known stay in the message: a template may read them, and
:mod:`qrosa.data.chat_template` notes those that it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qrosa.data.files import describe_type
from qrosa.errors import InputError

Message = dict[str, Any]

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "reasoning", "reasoning_content": "reasoning_content"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_CALLS = ("function_call", "tool_call", "call")  # roles whose text is a call that the assistant makes
_RESULTS = ("observation", "function_response", "tool_response", "function")
_LEARN = ("weight", "train", "training", "trainable", "loss", "loss_weight")
_PARTLY = ("train_detail", "training_detail")


@dataclass(frozen=True)
class Turn:
    """A message in the one form, and whether it may be learnt.

    Attributes:
        message: ``role``, ``content`` and whatever else the row gives it.
        learn: False where the row says that it is context only.
    """

    message: Message
    learn: bool = True


def read_turn(turn: Any, at: str, where: str) -> Turn:
    """One message of a row.

    Args:
        turn: What stands in the row.
        at: Its place in the row, such as ``messages[2]``.
        where: The row's place.

    Raises:
        InputError: Not a message, content other than text, or marks that cannot be honoured.
    """
    if not isinstance(turn, Mapping):
        _fail(where, f"{at} is {describe_type(turn)}, not a message", 'write messages as {"role": ..., "content": ...}')
    message = {str(key): value for key, value in turn.items() if value is not None}
    if "from" in turn and "role" not in message:
        message = _from_sharegpt(message, at, where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        _fail(where, f"{at} has no role", 'write messages as {"role": "user", "content": ...}')
    if role in _RESULTS:
        message["role"] = "tool"
    learn = _marks(message, at, where)
    _thought(message, at, where)
    if role in _CALLS:
        message = _called(message, at, where)
    _tool_calls(message, at, where)
    if "content" in message:
        message["content"] = _content(message, at, where)
    elif not message.get("tool_calls"):
        _fail(where, f"{at} has no content", 'write messages as {"role": ..., "content": "..."}')
    _check_texts(message, at, where)
    return Turn(message, learn)


def check_text(value: Any, name: str, where: str) -> str:
    """A text that UTF-8 can hold.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, str):
        _fail(where, f"{name} is {describe_type(value)}, not a text", 'write it as a text in quotes: "..."')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            _fail(where, f"{name} holds half of a surrogate pair", r"mend the \ud800-like escape in it")
    return value


def _from_sharegpt(message: Message, at: str, where: str) -> Message:
    name = message.pop("from", None)
    role = _SHAREGPT_ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        _fail(where, f"{at} is from {name!r}", f"use one of: {', '.join(_SHAREGPT_ROLES)}")
    value = {"content": message.pop("value")} if "value" in message else {}
    return {"role": role, **value, **message}


def _marks(message: Message, at: str, where: str) -> bool:
    """Take the marks of what is learnt off a message."""
    learn = True
    for name in _PARTLY:
        if message.pop(name, None):
            _fail(where, f"{at} marks parts of itself with {name!r}", "only whole messages can be left out of the loss")
    marks = {name: message.pop(name) for name in _LEARN if name in message}
    if "masked" in message:
        marks["masked"] = message.pop("masked")
    for name, value in marks.items():
        if isinstance(value, str) or value not in (0, 1):
            _fail(where, f"{at} has {name} {value!r}", "use 1 (learnt) or 0 (context only), true or false")
        wanted = bool(value) != (name == "masked")
        if wanted and message["role"] not in ("assistant", *_CALLS) and name != "masked":
            hint = "only the assistant's messages are learnt: leave the mark out, or use --train-on all"
            _fail(where, f"{at} asks with {name} {value!r} that a {message['role']} message be learnt", hint)
        learn = learn and wanted
    return learn


def _thought(message: Message, at: str, where: str) -> None:
    """Bring what the assistant thought before it spoke to the one key ``reasoning_content``."""
    if message["role"] != "assistant":
        return
    found = [message.pop(key) for key in THOUGHT_KEYS if key in message]
    parts = message.get("content")
    if isinstance(parts, list):
        for part in parts:
            kind = _THOUGHT_PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
            if kind is not None:
                found.append(part.get(kind) or part.get("text"))
        message["content"] = [
            part for part in parts if not (isinstance(part, dict) and str(part.get("type")) in _THOUGHT_PARTS)
        ]
    thoughts = {check_text(thought, f"{at} reasoning", where) for thought in found}
    if len(thoughts) > 1:
        _fail(where, f"{at} holds two different thoughts", f"keep one of {', '.join(THOUGHT_KEYS)}")
    if thoughts and (thought := thoughts.pop()).strip():
        message["reasoning_content"] = thought


def _called(message: Message, at: str, where: str) -> Message:
    """A message whose text is a call, as the assistant's message that makes it."""
    content = message.pop("content", None)
    calls = _json(content, f"{at} content", where) if isinstance(content, str) else content
    return {**message, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _tool_calls(message: Message, at: str, where: str) -> None:
    """Bring tool calls to ``{"type": "function", "function": {"name", "arguments"}}``."""
    if message["role"] == "assistant" and isinstance(message.get("function_call"), (dict, str)):
        message.setdefault("tool_calls", [message.pop("function_call")])
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _json(calls, f"{at} tool_calls", where) if calls.strip() else None
    if not calls:
        message.pop("tool_calls", None)
        return
    if not isinstance(calls, list):
        _fail(where, f"{at} tool_calls is {describe_type(calls)}, not a list", 'write "tool_calls": [{...}]')
    message["tool_calls"] = [_tool_call(call, at, where) for call in calls]


def _tool_call(call: Any, at: str, where: str) -> Message:
    if isinstance(call, str):
        call = _json(call, f"a tool call of {at}", where)
    if isinstance(call, dict) and isinstance(call.get("function"), str):
        call = {**call, "function": _json(call["function"], f"a tool call of {at}", where)}
    if isinstance(call, dict) and "function" not in call and "name" in call:
        rest = {key: value for key, value in call.items() if key not in ("name", "arguments", "parameters")}
        arguments = call.get("arguments", call.get("parameters", {}))
        call = {"type": "function", **rest, "function": {"name": call["name"], "arguments": arguments}}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        hint = 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'
        _fail(where, f"{at} has a tool call without a name", hint)
    return dict(call)


def _content(message: Message, at: str, where: str) -> str:
    """Text, or a list of text parts put together."""
    content = message["content"]
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        only_thought = not parts and ("reasoning_content" in message or "tool_calls" in message)
        if not only_thought and (not parts or not all(isinstance(part, str) for part in parts)):
            _fail(where, f"{at} has content other than text", "only text can be trained on")
        content = "".join(str(part) for part in parts)
    return check_text(content, f"{at} content", where)


def _json(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        _fail(where, f"{name} is not valid JSON", 'write a tool call as {"name": ..., "arguments": {...}}')


def _check_texts(value: Any, at: str, where: str) -> None:
    """Every text of a message, however deep, must be one that UTF-8 can hold."""
    if isinstance(value, str):
        check_text(value, at, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, at, where)
            _check_texts(item, f"{at} {key}", where)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, at, where)


def _fail(where: str, what: str, hint: str) -> NoReturn:
    raise InputError(f"{where}: {what}", hint)
