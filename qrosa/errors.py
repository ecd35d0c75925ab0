"""Every failure that a user can meet, with the exit code that the command line turns it into.

An error carries two sentences: what is wrong, and what to do about it. Library code raises these
classes; only ``qrosa.cli`` prints them. A plain Python exception that reaches the command line is a
bug in qrosa, and is reported as one.
"""

from __future__ import annotations

import re

_BEGINNING, _END = 600, 200  # characters of a message whose value at fault is longer than anybody reads


def _one_screen(message: str) -> str:
    """A message without the middle of an endless value: what it is about stands at its ends."""
    if len(message) <= _BEGINNING + _END:
        return message
    return f"{message[:_BEGINNING]} ... {message[-_END:]}"


class QrosaError(Exception):
    """Base of all errors meant for people.

    Args:
        message: What is wrong, one line, naming the file, flag or value at fault.
        hint: What to do about it, one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        self.message = _one_screen(message)
        self.hint = hint
        super().__init__(self.message)


class InputError(QrosaError):
    """Bad usage or bad input: a flag, a value, a data row, a missing or unsuitable model (exit code 2)."""

    exit_code = 2


class DoesNotFitError(QrosaError):
    """The work does not fit the memory that was asked for (exit code 3)."""

    exit_code = 3


class TrainingError(QrosaError):
    """Training failed: it diverged, or it taught the model nothing (exit code 4)."""

    exit_code = 4


class StorageError(QrosaError):
    """A file or disk fault: damaged, unreadable or unwritable files, no room left (exit code 5)."""

    exit_code = 5


class InterruptedRunError(QrosaError):
    """The user stopped the run, after a checkpoint was written (exit code 130)."""

    exit_code = 130


def first_line(error: Exception) -> str:
    """The first line of a library's error text, for errors that are one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def install_hint(*extras: str) -> str:
    """How to get the packages of optional parts: by their own names, which leads somewhere wherever qrosa came from.

    Args:
        extras: Groups of ``pyproject.toml``'s optional dependencies.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        listed = requires("qrosa") or []
    except PackageNotFoundError:  # run from a clone that was never installed
        listed = []
    names = []
    for line in listed:
        name, _, marker = line.partition(";")
        found = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if found and found[1] in extras:
            names.append(f"'{name.strip()}'")
    return "pip install " + " ".join(names or extras)
