"""What a row means: seven kinds of rows, told apart by their keys, brought to three forms.

    {"messages": [{"role": "user", "content": "..."}, ...]}                      chat        -> Conversation
    {"conversations": [{"from": "human", "value": "..."}, ...]}                  ShareGPT    -> Conversation
    {"instruction": "...", "input": "...", "output": "..."}                      Alpaca      -> Completion
    {"prompt": "..." or messages, "completion": "..." or messages}                           -> Completion, Conversation
    {"text": "..."}                                                                          -> Text
    {"prompt": "..." or messages, "chosen": "..." or messages, "rejected": ...}  preference  -> a pair of rows
    {"prompt": "..." or messages, "completion": ..., "label": true}              judged      -> Completion, Conversation

Where a row has the keys of two kinds, the first in this list counts, but for the last two where they are what is asked
for; :mod:`qrosa.data.columns` says what becomes of the
keys beside those of its kind. All rows of a source must be of one kind. A row that does not hold what its kind asks for
is an :class:`~qrosa.errors.InputError` that names its file and line: no row is mended or left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from qrosa.data.columns import COMPARED, JUDGED, KINDS, SYSTEM, Columns
from qrosa.data.files import describe_type
from qrosa.data.messages import Message, Turn, check_text, read_turn
from qrosa.data.notes import Notes
from qrosa.data.sources import read_records
from qrosa.errors import InputError
from qrosa.eval.objectives import Answers

_ACCEPTED = "use messages, conversations, instruction/input/output, prompt/completion, or text"


@dataclass(frozen=True)
class Conversation:
    """Chat messages, and which of the answers are learnt.

    Attributes:
        messages: In the form of :mod:`qrosa.data.messages`.
        first: Answers before this message are context.
        tools: Schemas of the tools that the assistant may call.
        context: Messages that the row marks as context only.
    """

    messages: list[Message]
    first: int = 0
    tools: list[Any] | None = None
    context: frozenset[int] = frozenset()

    @property
    def assistants(self) -> list[int]:
        """Places of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages that are to be learnt."""
        return [index for index in self.assistants if index >= self.first and index not in self.context]


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it.

    Attributes:
        prompt: Where there is a template, what the user says.
        completion: What is learnt.
        alpaca: Instruction and input; such prompts wear the fixed Alpaca frame where there is no template.
        before: System message and earlier turns; they need a template.
    """

    prompt: str
    completion: str
    alpaca: tuple[str, str] | None = None
    before: tuple[Message, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """The same as chat: earlier answers (a ``history``) are learnt as well, as its authors' tools do."""
        user, answer = {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}
        return Conversation([*self.before, user, answer])


@dataclass(frozen=True)
class Text:
    """Plain text, all of it to be learnt."""

    text: str


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its source, and where that is (``train.jsonl:12``).

    Attributes:
        fields: Its columns under qrosa's names.
        where: Its place.
        answers: How answers are asked for: a row that holds them so is of that kind, whatever else it holds, and of
            rows that are compared the last answer alone is learnt.
    """

    fields: Mapping[str, Any]
    where: str = "row"
    answers: Answers = "single"

    @cached_property
    def kind(self) -> str:
        """The row's kind, a key of :data:`~qrosa.data.columns.KINDS`.

        Raises:
            InputError: The row's keys are of no kind.
        """
        first = COMPARED.get(self.answers)
        for kind in KINDS if first is None else (first, *KINDS):
            if all(self.fields.get(key) is not None for key in KINDS[kind]):
                return kind
        for kind, keys in KINDS.items():
            if all(key in self.fields for key in keys):
                empty = next(key for key in keys if self.fields[key] is None)
                raise InputError(f"{self.where}: {empty!r} of this {kind} row is null", "fill it in, or drop the row")
        found = ", ".join(repr(str(key)) for key in list(self.fields)[:8]) or "none"
        hint = f"{_ACCEPTED}; or say which column is which: --columns prompt=question,completion=answer"
        raise InputError(f"{self.where}: no known kind of row has these keys: {found}", hint)

    def example(self) -> Conversation | Completion | Text:
        """The row in the form of its meaning, every part checked.

        Raises:
            InputError: A part is missing, null or of the wrong type.
        """
        kind = self.kind
        if kind in ("messages", "conversations"):
            return self._conversation(self._turns(kind, "user"))
        if kind == "alpaca":
            return self._alpaca()
        if kind in ("prompt-completion", JUDGED):
            return self._prompt_completion()
        return Text(self._text("text"))

    def _alpaca(self) -> Completion:
        instruction, output = self._text("instruction"), self._text("output")
        extra = "" if self.fields.get("input") is None else self._text("input")
        prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return Completion(prompt, output, (instruction, extra), (*self._system(), *self._history()))

    def _prompt_completion(self) -> Conversation | Completion:
        if isinstance(self.fields["prompt"], str) and isinstance(self.fields["completion"], str):
            before = (*self._system(), *self._history())
            tools = self._tools()
            whole = Completion(self._text("prompt"), self._text("completion"), before=before)
            if before and self.answers != "single":
                return Conversation(whole.conversation.messages, first=len(before) + 1, tools=tools)
            return whole if tools is None else Conversation(whole.conversation.messages, tools=tools)
        prompt = [*(Turn(message) for message in self._history()), *self._turns("prompt", "user")]
        return self._conversation([*prompt, *self._turns("completion", "assistant")], first=len(prompt))

    def _conversation(self, turns: list[Turn], first: int = 0) -> Conversation:
        system = self._system()
        if system and turns[0].message["role"] == "system":
            if turns[0].message.get("content") != system[0]["content"]:
                self._fail("has a system column and another system message", "keep one of the two")
            system = []
        messages = [*system, *(turn.message for turn in turns)]
        shift = len(system)
        context = frozenset(index + shift for index, turn in enumerate(turns) if not turn.learn)
        return Conversation(messages, first + shift if first else 0, self._tools(), context)

    def _system(self) -> list[Message]:
        """The system message that a column of its own holds."""
        found = [name for name in SYSTEM if self.fields.get(name)]
        if len({str(self.fields[name]) for name in found}) > 1:
            self._fail(f"has two different system texts, {found[0]!r} and {found[1]!r}", "keep one of the two")
        return [{"role": "system", "content": self._text(found[0])}] if found else []

    def _history(self) -> list[Message]:
        """Earlier turns, as pairs of question and answer or as messages."""
        value = self.fields.get("history")
        if not value:
            return []
        messages: list[Message] = []
        for index, item in enumerate(self._list("history")):
            if isinstance(item, dict):
                messages.append(read_turn(item, f"history[{index}]", self.where).message)
                continue
            if not isinstance(item, list) or len(item) != 2:
                self._fail(f"history[{index}] is {describe_type(item)}, not a pair", 'write ["question", "answer"]')
            for role, text in zip(("user", "assistant"), item, strict=True):
                messages.append({"role": role, "content": check_text(text, f"history[{index}]", self.where)})
        return messages

    def _turns(self, key: str, role: str) -> list[Turn]:
        """A list of messages, or one text as the only message of ``role``."""
        if key in ("prompt", "completion") and isinstance(self.fields[key], str):
            return [Turn({"role": role, "content": self._text(key)})]
        if key in ("prompt", "completion") and not isinstance(self.fields[key], list):
            self._text(key)
        return [read_turn(turn, f"{key}[{index}]", self.where) for index, turn in enumerate(self._list(key))]

    def _list(self, key: str) -> list[Any]:
        """A non-empty list; where it comes as JSON text (CSV and some Parquet files) or by columns, that is read."""
        value = self.fields[key]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                self._fail(f"{key!r} is a text, not a list of messages", "write a list of messages")
        if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
            value = self._by_rows(key, value)
        if not isinstance(value, list):
            self._fail(f"{key!r} is {describe_type(value)}, not a list", "write a list of messages")
        if not value:
            self._fail(f"{key!r} is empty", "give every row at least one message")
        return value

    def _by_rows(self, key: str, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Messages that ``datasets`` has turned into one object of lists."""
        if len({len(column) for column in columns.values()}) > 1:
            self._fail(f"{key!r} is an object of lists of different lengths", "write a list of messages")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _tools(self) -> list[Any] | None:
        tools = self.fields.get("tools")
        try:
            if isinstance(tools, str) and tools.strip():
                tools = json.loads(tools)
            if isinstance(tools, list):
                tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        except (ValueError, RecursionError):
            self._fail("'tools' is not valid JSON", "write a list of tool schemas")
        if not tools or (isinstance(tools, str) and not tools.strip()):
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            self._fail("'tools' is not a list of objects", "write a list of tool schemas")
        return tools

    def _text(self, key: str) -> str:
        return check_text(self.fields.get(key), repr(key), self.where)

    def _fail(self, what: str, hint: str) -> NoReturn:
        raise InputError(f"{self.where}: {what}", hint)


def read_rows(
    source: str | Path,
    *,
    split: str | Sequence[str] = "train",
    columns: Columns | None = None,
    notes: Notes | None = None,
    files: list[str] | None = None,
    answers: Answers = "single",
) -> Iterator[RawRow]:
    """The rows of a file, folder or ``datasets`` id, streamed; see :func:`qrosa.data.sources.read_records`.

    Each row's keys are checked here; what stands under them is checked by :meth:`RawRow.example`.

    Args:
        source: A file, a folder or a ``datasets`` id.
        split: Which of a folder's or hub data set's splits.
        columns: What the columns are called.
        notes: Takes what is passed over.
        files: Takes the names of the files that are read.
        answers: How answers are asked for; rows that hold them so are of that kind, whatever else they hold.

    Raises:
        InputError: No such source, no rows in it, a malformed row, an unknown kind of row, or two kinds in one source.
        StorageError: A file cannot be read.
    """
    columns, notes = columns or Columns(), Notes() if notes is None else notes
    first: RawRow | None = None
    first_kind = ""
    for fields, where in read_records(source, split=split, columns=columns.worth_reading, notes=notes, files=files):
        row = RawRow(columns.rename(fields, where), where, answers)
        kind = row.kind
        if first is None:
            first, first_kind = row, kind
        if kind != first_kind:
            message = f"{where} is a {kind} row, but {first.where} is a {first_kind} row"
            raise InputError(message, "split the file by kind, and give each part with a --data of its own")
        columns.check(row.fields, kind, where, notes)
        yield row
    if first is None:
        raise InputError(f"{source} holds no rows", _ACCEPTED + ", one a row")
