"""Which examples train, validate and test: by the hash of their content, so that no order or seed has a say.

A group's SHA-256, a number from 0 to 1, puts all of its examples into one split. Within a split, examples are taken in
the order of their own hashes, one label after another as long as each has some left, until the split has its size.
Test is filled first. An example is passed over that repeats one already taken, or that nearly repeats one of another
split. Two texts nearly repeat each other where their sets of three-word runs have a Jaccard index of at least 0.5.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.accuracy.sources import Example

SHARES = {"test": 0.42, "validation": 0.14, "train": 0.44}
"""Of the groups, in the order in which splits are filled."""
NEAR = 0.5
MOST_LABELS = 16


@dataclass
class Splits:
    """The examples of each split, and how many were passed over as repeats."""

    examples: dict[str, list[Example]] = field(default_factory=dict)
    repeats: int = 0


def place(text: str) -> float:
    """A number from 0 up to 1 that follows from a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(group: str) -> str:
    """The split of a group."""
    at = place(group)
    edge = 0.0
    for name, share in SHARES.items():
        edge += share
        if at < edge:
            return name
    return list(SHARES)[-1]


def runs(text: str) -> frozenset[str]:
    """A text's runs of three words; of a shorter text, the text."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard index of two sets."""
    return len(a & b) / len(a | b)


def divide(
    examples: Iterable[Example], sizes: dict[str, int], *, near: bool = True, tested: Iterable[Example] | None = None
) -> Splits:
    """Pick the examples of each split.

    Args:
        examples: All there are, in any order.
        sizes: Split -> examples wanted; there may be fewer.
        near: Look for near-duplicates. Off for a task whose examples all follow one template, where only exact
            repeats are passed over.
        tested: Examples of another source, to test on instead of those that the hash would pick.
    """
    pools: dict[str, list[Example]] = {name: [] for name in SHARES}
    for example in examples:
        pools[split_of(example.group)].append(example)
    if tested is not None:
        pools["test"] = list(tested)
    found = Splits()
    others: list[frozenset[str]] = []
    texts: set[str] = set()
    for name, pool in pools.items():
        chosen: list[Example] = []
        for example in in_turns(pool):
            if len(chosen) == sizes.get(name, 0):
                break
            own = runs(example.text)
            if example.text in texts or (near and any(alike(own, other) >= NEAR for other in others)):
                found.repeats += 1
                continue
            chosen.append(example)
            texts.add(example.text)
        others += [runs(example.text) for example in chosen]
        found.examples[name] = sorted(chosen, key=lambda example: place(example.text))
    return found


def in_turns(pool: Iterable[Example]) -> list[Example]:
    """Examples in the order of their hashes, a label at a time, as long as each label has some left.

    More than ``MOST_LABELS`` different answers are free text: then the order of the hashes alone counts.
    """
    ordered = sorted(pool, key=lambda example: place(example.text + example.answer))
    by_answer: dict[str, list[Example]] = defaultdict(list)
    for example in ordered:
        by_answer[example.answer].append(example)
    if len(by_answer) > MOST_LABELS:
        return ordered
    # The first of each label, then the second of each, and so on.
    turns = sorted((index, answer) for answer, own in by_answer.items() for index in range(len(own)))
    return [by_answer[answer][index] for index, answer in turns]
