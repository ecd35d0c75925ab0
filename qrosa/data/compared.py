"""Rows that hold answers to compare: a preference as a row for each of its answers, and the label of a judged one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qrosa.data.columns import PREFERENCE, USED
from qrosa.data.files import describe_type
from qrosa.data.formats import RawRow
from qrosa.errors import InputError

_LABELS = {"true": True, "1": True, "false": False, "0": False}


def split_pair(row: RawRow) -> tuple[RawRow, RawRow]:
    """A preference's answers as rows of their own: the chosen one, then the rejected one.

    Of answers that are whole conversations, their prompt included, the messages that both begin with are the prompt.
    """
    rest = {key: value for key, value in row.fields.items() if key in USED[PREFERENCE] - {"chosen", "rejected"}}
    chosen, rejected = row.fields["chosen"], row.fields["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        rest["prompt"], chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    first, second = (RawRow({**rest, "completion": answer}, row.where, row.answers) for answer in (chosen, rejected))
    return first, second


def _is_whole(answer: Any) -> bool:
    """The answer is a conversation that begins with its prompt."""
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and str(first.get("role", "assistant")) != "assistant"


def is_wanted(row: RawRow) -> bool:
    """What the label of a judged row says.

    Raises:
        InputError: It says neither true nor false.
    """
    label = row.fields["label"]
    found = _LABELS.get(str(label).strip().lower()) if isinstance(label, (bool, int, str)) else None
    if found is None:
        what = repr(label) if isinstance(label, (int, str)) else describe_type(label)
        raise InputError(f"{row.where}: 'label' is {what[:80]}, and says neither true nor false", "write true or false")
    return found
