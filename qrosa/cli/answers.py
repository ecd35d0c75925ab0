"""Stdout belongs to the answers.

Programs read what commands and scripts print, and libraries print too: at import, on a first run, from C code, into
whatever stdout was when their logger was made. While a command runs, its own answers therefore go to a copy of stdout
that nobody else holds, and everything else that is written to stdout, by Python or past it, comes out on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_kept: list[TextIO] = []  # the copy of stdout, while there is one


def answers() -> TextIO:
    """Where a command writes its answer."""
    return _kept[-1] if _kept else sys.stdout


@contextmanager
def stdout_for_answers() -> Iterator[None]:
    """Keep stdout for what is written to :func:`answers`; the rest goes to stderr while the block runs."""
    descriptor, error = _descriptor(sys.stdout), _descriptor(sys.stderr)
    block = _swapped_streams() if descriptor is None or error is None else _swapped_descriptors(descriptor, error)
    with block:
        yield


@contextmanager
def _swapped_descriptors(descriptor: int, error: int) -> Iterator[None]:
    """``sys.stdout`` stays the object it is (line editing needs that); the file behind it is stderr's meanwhile."""
    outer = sys.stdout
    outer.flush()
    copy = os.dup(descriptor)
    kept = open(copy, "w", encoding=outer.encoding, errors=outer.errors, closefd=False)
    _kept.append(kept)
    os.dup2(error, descriptor)
    try:
        yield
        kept.flush()  # a full disk or a closed pipe shows here, where it can still be reported
    finally:
        with suppress(OSError):  # what libraries printed goes to stderr, whose reader may have gone
            outer.flush()
        os.dup2(copy, descriptor)
        _kept.pop()
        with suppress(OSError):  # its reader may have gone
            kept.close()
        os.close(copy)


@contextmanager
def _swapped_streams() -> Iterator[None]:
    """Where stdout is no file (a notebook, a test that captures it), only what Python prints can be told apart."""
    outer = sys.stdout
    _kept.append(outer)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = outer
        _kept.pop()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
