"""Every exception that can end a command, as a message, a hint and an exit code.

Torch-free: exceptions of heavy libraries are told by their class name or their text, since a command that never
imported them cannot meet them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import click

from qrosa.errors import QrosaError

_BUG_HINT = "this is a bug in qrosa: run the command again with --debug to see where, and report what it prints"
_MEMORY_HINT = "'qrosa plan' shows what takes it; try a smaller --micro-batch or a shorter --seq-len"
# As torch, oneDNN and safetensors word it where an allocation of their own fails.
_MEMORY_WORDS = ("DefaultCPUAllocator", "could not create a primitive", "unable to mmap", "Cannot allocate memory")
_LOST_PROCESS_WORDS = ("/gloo/", "[gloo", "Connection closed by peer", "NCCL error", "ProcessGroup", "[c10d]")
_OS_HINTS = {
    errno.ENOSPC: ("no room left on the disk", "free some room, or choose a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some room, or choose a folder on another disk"),
    errno.EACCES: ("permission denied", "check the permissions of the file and its folder, or choose another place"),
    errno.EPERM: ("operation not permitted", "check the permissions of the file and its folder"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written to"),
    errno.EBADF: ("an output that is closed was written to", "leave stdout and stderr open, or send them to /dev/null"),
    errno.EIO: ("the disk reports an input/output error", "check the disk; copy the data elsewhere and try again"),
}


@dataclass(frozen=True)
class Failure:
    """What is printed, and the exit code."""

    message: str
    hint: str
    exit_code: int


def describe(error: BaseException) -> Failure:
    """Put any exception into two lines for people.

    Args:
        error: What was raised; a :class:`QrosaError` carries its own text, the rest is recognised here.
    """
    if isinstance(error, QrosaError):
        return Failure(error.message, error.hint, error.exit_code)
    if isinstance(error, click.ClickException):
        return _usage_failure(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure("ran out of memory", _MEMORY_HINT, 3)
    text = str(error)
    if isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS):
        return Failure("ran out of memory", _MEMORY_HINT, 3)
    if type(error).__name__.startswith("Dist") or any(words in text for words in _LOST_PROCESS_WORDS):
        return Failure(
            "another process of this run has ended, or has not answered within --timeout",
            "its own output says why; 'qrosa finetune --resume' goes on from the last checkpoint",
            4,
        )
    code, path = _os_error(error)
    if code is not None:
        what, hint = _OS_HINTS.get(code, (os.strerror(code).lower(), "check the path, and that the disk is healthy"))
        return Failure(f"{path}: {what}" if path else what, hint, 5)
    lines = str(error).strip().splitlines()
    first = f": {lines[0]}" if lines else ""
    return Failure(f"unexpected {type(error).__name__}{first}", _BUG_HINT, 1)


def printable(text: str) -> str:
    """Text of a file or model for a terminal: control characters, which could move the cursor, retitle the window or
    hide what follows, as ``\\x1b``; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda c: ascii(c[0])[1:-1], text)


def drop_output(descriptor: int) -> None:
    """Point stdout (1) or stderr (2) at nothing, so that no later write or flush can complain of a reader that left."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def suggest(word: str, known: Sequence[str]) -> str | None:
    """``did you mean ...?`` for the nearest known word, or None."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None


def _usage_failure(error: click.ClickException) -> Failure:
    context = getattr(error, "ctx", None)
    hint = f"'{context.command_path if context else 'qrosa'} --help' shows what is accepted"
    message = error.format_message().strip()
    if isinstance(error, click.NoSuchOption):
        message = f"no such option {error.option_name}"
        known = [name for p in context.command.params for name in p.opts] if context else []
        hint = suggest(error.option_name, known) or hint
    message = message.splitlines()[0].rstrip(".")
    return Failure(message[:1].lower() + message[1:], hint, error.exit_code if error.exit_code != 1 else 2)


def _os_error(error: BaseException) -> tuple[int | None, str | None]:
    """The errno and the path of a file fault, however the library underneath words it."""
    if isinstance(error, OSError) and error.errno is not None:
        if isinstance(error.filename, bytes):
            return error.errno, os.fsdecode(error.filename)
        # Without a path, only the faults that a disk has by itself are certain to be about files.
        if error.filename is not None:
            return error.errno, str(error.filename)
        return (error.errno, None) if error.errno in _OS_HINTS else (None, None)
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, tokenizers
    return (int(rust[1]), None) if rust else (None, None)
