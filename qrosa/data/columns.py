"""What the columns of a row mean: those that are read, those that are passed over, and those that must not be.

A column that is no part of its kind of row is passed over and noted. Some columns, though, change what the others
mean: a row of preference data is half of a comparison, an answer with ``label: false`` is one to unlearn. Training on
the rest of such a row would teach what its author did not mean, so it is refused - unless ``--columns`` names the
columns to train on, which says that the others are to be left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qrosa.data.notes import Notes
from qrosa.errors import InputError

KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "judged": ("prompt", "completion", "label"),
}
PREFERENCE, JUDGED = "preference", "judged"
COMPARED: dict[str, str] = {"pairs": PREFERENCE, "judged": JUDGED}
"""Kinds of rows that hold answers to compare, by how the answers stand in them (:data:`qrosa.eval.objectives.Answers`).

They are looked for where they are asked for, and then first.
"""
SYSTEM = ("system", "system_prompt", "system_message")
_BESIDE: dict[str, tuple[str, ...]] = {
    "messages": ("tools", *SYSTEM),
    "conversations": ("tools", *SYSTEM),
    "alpaca": ("input", "history", *SYSTEM),
    "prompt-completion": ("tools", "history", *SYSTEM),
    "text": (),
    "preference": ("tools", "history", *SYSTEM),
    "judged": ("tools", "history", *SYSTEM),
}
USED = {kind: frozenset((*keys, *_BESIDE[kind])) for kind, keys in KINDS.items()}
"""The columns that each kind of row uses."""
_TARGETS = frozenset().union(*USED.values())

_LABELS = ("label", "kto_tag", "desirable", "is_desirable", "is_chosen", "preferred")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
_WEIGHTS = ("weight", "sample_weight", "loss_weight")
_OTHERS = ("functions", "chat_template_kwargs", "history", *SYSTEM)
_PREFERENCE = re.compile(r"(\w+_)?(chosen|rejected)(_(response|messages|conversations?|completion|answer|text))?")
_PREFERENCE_NAMES = tuple(
    f"{name}{end}" for name in ("chosen", "rejected") for end in ("", "_response", "_messages", "_conversations")
)
COLUMNS = frozenset({*_TARGETS, *_LABELS, *_MEDIA, *_WEIGHTS, *_OTHERS, *_PREFERENCE_NAMES})
"""Every column that is worth reading out of a file of columns: those that are used and those that are refused."""

_WAY_OUT = "name the columns to train on, such as --columns prompt=question,completion=answer"


class Columns:
    """Renames columns as ``--columns`` says, refuses what changes the meaning, notes what is passed over.

    Args:
        text: ``prompt=question,completion=answer``: what qrosa calls a column, and its name in the data; None to take
            the names as they are.

    Raises:
        InputError: Not of this form, or a column that qrosa knows nothing of.
    """

    def __init__(self, text: str | None = None) -> None:
        self._names = parse_columns(text) if text else {}

    @property
    def worth_reading(self) -> frozenset[str]:
        """Columns that are read, by their names in the data."""
        return COLUMNS | frozenset(self._names.values())

    def rename(self, fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The row under qrosa's names.

        Raises:
            InputError: The row has none, or not all, of the columns that were named.
        """
        if not self._names:
            return fields
        missing = [name for name in self._names.values() if name not in fields]
        if missing:
            found = ", ".join(repr(str(key)) for key in list(fields)[:8]) or "none"
            raise InputError(f"{where}: --columns names {missing[0]!r}, and the row has {found}", "name one of these")
        taken = {*self._names, *self._names.values()}
        rest = {key: value for key, value in fields.items() if key not in taken}
        return {**rest, **{target: fields[name] for target, name in self._names.items()}}

    def check(self, fields: Mapping[str, Any], kind: str, where: str, notes: Notes) -> None:
        """Refuse or note the columns beside those that ``kind`` uses.

        Args:
            fields: The row as :meth:`rename` gave it.
            kind: A key of :data:`KINDS`.
            where: The row's place.
            notes: Takes what is passed over.

        Raises:
            InputError: A column changes the meaning of the row.
        """
        for name, value in fields.items():
            if name in USED[kind] or value is None or value == "" or value == []:
                continue
            reason = None if self._names else _refusal(name, value, kind)
            if reason is not None:
                raise InputError(f"{where}: column {name!r} {reason[0]}", reason[1])
            notes.add(f"column {name!r}", f"no part of {kind} rows", where)


def parse_columns(text: str) -> dict[str, str]:
    """``prompt=question,completion=answer`` as qrosa's name -> the data's.

    Raises:
        InputError: Not of this form, or a column that qrosa knows nothing of.
    """
    names: dict[str, str] = {}
    for part in text.split(","):
        target, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not target or not name:
            raise InputError(f"--columns {text!r} is not a list of names", "write prompt=question,completion=answer")
        if target not in _TARGETS:
            known = ", ".join(sorted(_TARGETS))
            raise InputError(f"--columns names {target!r}, which no kind of row has", f"use some of {known}")
        if target in names:
            raise InputError(f"--columns names {target!r} twice", "name each column once")
        names[target] = name
    return names


def _refusal(name: str, value: Any, kind: str) -> tuple[str, str] | None:
    """Why a column cannot be passed over, and what to do; None where it can."""
    if _PREFERENCE.fullmatch(name) and isinstance(value, (str, list, dict)):
        return "is half of a preference, and one answer alone is not what it says", f"to train on one: {_WAY_OUT}"
    if name in _LABELS and kind != "text" and _is_boolean(value):
        hint = f"to learn from both: --objective kto; or keep the rows whose label is true; or {_WAY_OUT}"
        return "says whether the answer is wanted, and unwanted ones would be learnt", hint
    if name in _MEDIA:
        return "holds images, sound or video, which are not trained on", f"use rows of text; or {_WAY_OUT}"
    if name in _WEIGHTS and _number(value) not in (None, 1.0):
        return f"weighs the row by {value}, and all rows weigh the same here", f"use --data FILE=0.3; or {_WAY_OUT}"
    if name == "functions" and kind != "text":
        return "holds functions, which the template would not be given", "pass them as tools: --columns tools=functions"
    if name == "chat_template_kwargs" and value:
        return "changes how the chat template writes the row", "give a template that does so with --chat-template"
    if name in (*SYSTEM, "history") and kind == "text":
        return "is no part of a plain text", f"put it into the text; or {_WAY_OUT}"
    if name == "history":
        return "holds earlier turns, which chat rows hold in their messages", f"put them there; or {_WAY_OUT}"
    return None


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
