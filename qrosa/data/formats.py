"""What a row means: five kinds of rows, told apart by their keys, brought to three forms.

    {"messages": [{"role": "user", "content": "..."}, ...]}                      chat        -> Conversation
    {"conversations": [{"from": "human", "value": "..."}, ...]}                  ShareGPT    -> Conversation
    {"instruction": "...", "input": "...", "output": "..."}                      Alpaca      -> Completion
    {"prompt": "..." or messages, "completion": "..." or messages}                           -> Completion, Conversation
    {"text": "..."}                                                                          -> Text

Where a row has the keys of two kinds, the first in this list counts; keys beside those of its kind are passed over.
All rows of a source must be of one kind. A row that does not hold what its kind asks for is an
:class:`~qrosa.errors.InputError` that names its file and line: no row is mended or left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qrosa.data.files import describe_type, read_records
from qrosa.errors import InputError

Message = dict[str, Any]

KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
COLUMNS = frozenset({key for keys in KINDS.values() for key in keys} | {"input", "system", "tools"})
_ACCEPTED = "use messages, conversations, instruction/input/output, prompt/completion, or text"
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Chat messages; the answers from message ``first`` on are to be learnt."""

    messages: list[Message]
    first: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it. ``alpaca`` prompts wear the fixed Alpaca frame where there is no template."""

    prompt: str
    completion: str
    alpaca: tuple[str, str] | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, all of it to be learnt."""

    text: str


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its source, and where that is (``train.jsonl:12``)."""

    fields: Mapping[str, Any]
    where: str = "row"

    @property
    def kind(self) -> str:
        """The row's kind, a key of :data:`KINDS`.

        Raises:
            InputError: The row's keys are of no kind.
        """
        for kind, keys in KINDS.items():
            if all(self.fields.get(key) is not None for key in keys):
                return kind
        for kind, keys in KINDS.items():
            if all(key in self.fields for key in keys):
                empty = next(key for key in keys if self.fields[key] is None)
                raise InputError(f"{self.where}: {empty!r} of this {kind} row is null", "fill it in, or drop the row")
        found = ", ".join(repr(str(key)) for key in list(self.fields)[:8]) or "none"
        raise InputError(f"{self.where}: no known kind of row has these keys: {found}", _ACCEPTED)

    def example(self) -> Conversation | Completion | Text:
        """The row in the form of its meaning, every part checked.

        Raises:
            InputError: A part is missing, null or of the wrong type.
        """
        kind = self.kind
        if kind == "messages":
            return Conversation(self._messages("messages"), tools=self._tools())
        if kind == "conversations":
            return Conversation(self._sharegpt(), tools=self._tools())
        if kind == "alpaca":
            return self._alpaca()
        if kind == "prompt-completion":
            return self._prompt_completion()
        return Text(self._text("text"))

    def _alpaca(self) -> Completion:
        instruction, output = self._text("instruction"), self._text("output")
        extra = "" if self.fields.get("input") is None else self._text("input")
        prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return Completion(prompt, output, alpaca=(instruction, extra))

    def _prompt_completion(self) -> Conversation | Completion:
        if isinstance(self.fields["prompt"], str) and isinstance(self.fields["completion"], str):
            return Completion(self._text("prompt"), self._text("completion"))
        prompt = self._turns("prompt", "user")
        return Conversation([*prompt, *self._turns("completion", "assistant")], first=len(prompt), tools=self._tools())

    def _turns(self, key: str, role: str) -> list[Message]:
        """A list of messages, or one text as the only message of ``role``."""
        if isinstance(self.fields[key], list):
            return self._messages(key)
        return [{"role": role, "content": self._text(key)}]

    def _messages(self, key: str) -> list[Message]:
        return [self._message(turn, f"{key}[{index}]") for index, turn in enumerate(self._list(key))]

    def _sharegpt(self) -> list[Message]:
        messages = []
        for index, turn in enumerate(self._list("conversations")):
            at = f"conversations[{index}]"
            if isinstance(turn, dict) and "from" in turn:
                name = turn["from"]
                role = _SHAREGPT_ROLES.get(name.lower()) if isinstance(name, str) else None
                if role is None:
                    self._fail(f"{at} is from {name!r}", f"use one of: {', '.join(_SHAREGPT_ROLES)}")
                turn = {"role": role, "content": turn.get("value")}
            messages.append(self._message(turn, at))
        if self.fields.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._text("system")})
        return messages

    def _list(self, key: str) -> list[Any]:
        """A non-empty list; where it comes as JSON text (CSV and some Parquet files), that is read."""
        value = self.fields[key]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                self._fail(f"{key!r} is a text, not a list of messages", "write a list of messages")
        if not isinstance(value, list):
            self._fail(f"{key!r} is {describe_type(value)}, not a list", "write a list of messages")
        if not value:
            self._fail(f"{key!r} is empty", "give every row at least one message")
        return value

    def _message(self, turn: Any, at: str) -> Message:
        if not isinstance(turn, dict):
            self._fail(
                f"{at} is {describe_type(turn)}, not a message", 'write messages as {"role": ..., "content": ...}'
            )
        message = {key: value for key, value in turn.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or not role:
            self._fail(f"{at} has no role", 'write messages as {"role": "user", "content": ...}')
        if "content" in message:
            message["content"] = self._content(message["content"], at)
        elif not message.get("tool_calls"):
            self._fail(f"{at} has no content", 'write messages as {"role": ..., "content": "..."}')
        return message

    def _content(self, content: Any, at: str) -> str:
        """Text, or a list of text parts put together."""
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not parts or not all(isinstance(part, str) for part in parts):
                self._fail(f"{at} has content other than text", "only text can be trained on")
            content = "".join(str(part) for part in parts)
        return self._check_text(content, f"{at} content")

    def _tools(self) -> list[Any] | None:
        tools = self.fields.get("tools")
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                self._fail("'tools' is not valid JSON", "write a list of tool schemas")
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            self._fail("'tools' is not a list of objects", "write a list of tool schemas")
        return tools

    def _text(self, key: str) -> str:
        return self._check_text(self.fields.get(key), repr(key))

    def _check_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self._fail(f"{name} is {describe_type(value)}, not a text", 'write it as a text in quotes: "..."')
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                self._fail(f"{name} holds half of a surrogate pair", r"mend the \ud800-like escape in it")
        return value

    def _fail(self, what: str, hint: str) -> NoReturn:
        raise InputError(f"{self.where}: {what}", hint)


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[RawRow]:
    """The rows of a file, folder or ``datasets`` id, streamed; see :func:`qrosa.data.files.read_records`.

    Each row's keys are checked here; what stands under them is checked by :meth:`RawRow.example`.

    Raises:
        InputError: No such source, no rows in it, a malformed row, an unknown kind of row, or two kinds in one source.
        StorageError: A file cannot be read.
    """
    first: RawRow | None = None
    first_kind = ""
    for fields, where in read_records(source, split=split, columns=COLUMNS):
        row = RawRow(fields, where)
        if first is None:
            first, first_kind = row, row.kind
        if row.kind != first_kind:
            message = f"{where} is a {row.kind} row, but {first.where} is a {first_kind} row"
            raise InputError(message, "train on one kind of rows at a time: split the file by kind")
        yield row
    if first is None:
        raise InputError(f"{source} holds no rows", _ACCEPTED + ", one a row")
