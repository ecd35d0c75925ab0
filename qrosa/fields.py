"""One setting: a dataclass field with its help, and the way from what a user wrote to a value of the field's type."""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import field
from typing import Any

from qrosa.errors import InputError
from qrosa.quantities import parse_share

_MOST = 2**53  # beyond it a float no longer counts one by one
_LONGEST_SHOWN = 60  # characters


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    repeated: bool = False,
    auto: bool = False,
) -> Any:
    """A dataclass field that carries its own command-line help.

    Args:
        default: The field's default.
        help: For ``--help``.
        choices: What can be said, if that is a closed list.
        metavar: What ``--help`` shows for the value.
        auto: ``auto`` can be said, and means the same as saying nothing.
        repeated: Several values are given by giving the flag several times (a list in YAML), not with commas.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "repeated": repeated, "auto": auto}
    return field(default=default, metadata=metadata)


def coerce(name: str, value: Any, hint: Any, choices: tuple[str, ...] | None, repeated: bool = False) -> Any:
    """Turn text or a YAML scalar into the field's type, or say what was expected."""
    flag = "--" + name.replace("_", "-")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = [value] if repeated and isinstance(value, str) else _parts(flag, value)
        items = tuple(str(part).strip() for part in parts if str(part).strip())
        for item in items:
            check_choice(flag, item, choices)
        return items
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f"{flag} has the wrong type: {quoted(value)}", "write true or false")
        return value
    if isinstance(value, bool) and {"on", "off"} <= {*(choices or ())}:  # YAML reads them as booleans
        value = "on" if value else "off"
    if isinstance(value, (bool, dict, list)):
        raise InputError(f"{flag} has the wrong type: {quoted(value)}", f"give one {hint.__name__}")
    try:
        if name == "density":
            return parse_share(value, flag)
        if hint is int:
            number = float(value)
            if number != math.floor(number) or abs(number) > _MOST:
                raise ValueError
            return int(number)
        if hint is float:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
    except (ValueError, OverflowError, TypeError):
        kind = "a whole number" if hint is int else "a number"
        raise InputError(f"{flag} {quoted(value)} is not {kind}", f"give {kind}") from None
    check_choice(flag, str(value), choices)
    return str(value)


def _parts(flag: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return value.split(",")
    if not isinstance(value, (list, tuple)) or any(isinstance(part, (dict, list)) for part in value):
        raise InputError(f"{flag} has the wrong type: {quoted(value)}", "give one text or a list of texts")
    return list(value)


def check_choice(flag: str, value: str, choices: tuple[str, ...] | None) -> None:
    """Refuse a value that is not one of ``choices``, where there are any."""
    if choices and value not in choices:
        raise InputError(f"{flag} {quoted(value)} is unknown", f"use one of: {', '.join(choices)}")


def quoted(value: Any) -> str:
    """A value for an error message: one short line, whatever it is."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def check_positive(name: str, value: float) -> None:
    """Refuse zero and less."""
    if not value > 0:
        raise InputError(f"--{name.replace('_', '-')} {value:g} is not above zero", "use a positive number")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not from ``low`` to ``high``."""
    if not low <= value <= high:
        raise InputError(f"--{name.replace('_', '-')} {value:g} is out of range", f"use a number from {low} to {high}")


def suggest(key: str, known: list[str]) -> str:
    """A hint for an unknown key: the known one that it resembles, or where to look."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "see 'qrosa finetune --help' for all settings"
