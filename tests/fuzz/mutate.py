"""Mutations for fuzzing: of bytes, and of JSON documents; and the loop that tries them for some seconds.

A target takes a generator, makes a case from it and tries it. It returns whether the case was refused, and raises where
the product let damage through or failed otherwise. Each case has a seed of its own, which is printed with a failure and
makes it again.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 1e308, -0.0, float("inf"), float("nan"), 0.5, "", " ", "\x00",
    "\x1b[2J", "\ud800", "é" * 50, "../../x", "/etc/passwd", "9" * 6000, [], {}, [[]], [None], {"": {}}, "%s", "1e999",
)  # fmt: skip


_TOKENS = (b"\0", b'"', b"[", b"{", b"9" * 300, b"\xff", b"*a", b"&a ", b"\n")


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to three small changes."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + rng.randbytes(length) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at : at + length] + data[at:]
        elif kind == 4:
            data = data[:at]
        else:
            data = data[:at] + rng.choice(_TOKENS) + data[at:]
    return data


def mutated_json(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON document in which one node is replaced, deleted, renamed or wrapped."""
    document = copy.deepcopy(document)
    nodes = list(_nodes(document))
    if not nodes:
        return rng.choice(NASTY)
    holder, key = rng.choice(nodes)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(key) + rng.choice(("x", " ", "é", "²"))] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3 and type(holder[key]) in (int, float):
        holder[key] = holder[key] + rng.choice((-1, 1, 0.5, 10**9))
    else:
        holder[key] = rng.choice(NASTY)
    return document


def _nodes(document: Any) -> Any:
    """Every (container, key or index) of a document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(entries):
        yield document, key
        if isinstance(value, (dict, list)):
            yield from _nodes(value)


def fuzz(target: Callable[[random.Random], bool], *, seconds: float | None = None, first: int = 0) -> tuple[int, int]:
    """Try cases for some seconds (``QROSA_FUZZ_SECONDS``, 15 if it is not set).

    Returns:
        Cases, and how many of them were refused.

    Raises:
        AssertionError: A case failed; its seed is named.
    """
    limit = float(os.environ.get("QROSA_FUZZ_SECONDS", "15")) if seconds is None else seconds
    end, seed, refused = time.monotonic() + limit, first, 0
    while time.monotonic() < end:
        begun = time.process_time()
        try:
            refused += target(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}") from error
        assert time.process_time() - begun < 10, f"seed {seed} took longer than 10 s"
        seed += 1
    return seed - first, refused
