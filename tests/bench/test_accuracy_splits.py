"""The splits of the accuracy benchmark: disjoint, by content, without near-duplicates across them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.accuracy.sources import Example
from bench.accuracy.splits import NEAR, SHARES, alike, divide, runs, split_of
from bench.accuracy.tasks import PINNED, PROMPTS, TASKS

WORDS = [f"word{index}" for index in range(400)]


def example(seed: int, *, answer: str = "yes", group: str | None = None, words: int = 12) -> Example:
    text = " ".join(random.Random(seed).sample(WORDS, words))
    return Example({"text": text}, answer, text if group is None else group)


def many(count: int = 600) -> list[Example]:
    return [example(seed, answer="yes" if seed % 3 else "no") for seed in range(count)]


SIZES = {"test": 100, "validation": 30, "train": 100}


def test_the_order_of_the_source_has_no_say() -> None:
    examples = many()
    shuffled = examples[:]
    random.Random(1).shuffle(shuffled)
    assert divide(examples, SIZES).examples == divide(shuffled, SIZES).examples


def test_sizes_and_balance() -> None:
    found = divide(many(), SIZES).examples
    assert {name: len(rows) for name, rows in found.items()} == SIZES
    for rows in found.values():
        assert abs(sum(row.answer == "yes" for row in rows) - len(rows) / 2) <= 1


def test_a_group_stays_in_one_split() -> None:
    examples = [example(seed, group=f"group{seed % 40}") for seed in range(600)]
    found = divide(examples, {"test": 600, "validation": 600, "train": 600}, near=False).examples
    places: dict[str, set[str]] = {}
    for name, rows in found.items():
        for row in rows:
            places.setdefault(row.group, set()).add(name)
    assert len(places) == 40
    assert all(len(names) == 1 for names in places.values())
    assert {name for names in places.values() for name in names} == set(SHARES)


def test_near_duplicates_never_stand_in_two_splits() -> None:
    examples = many(300)
    # The same texts with one word put on: other hashes, hence other splits for many of them.
    examples += [Example({"text": row.text + " again"}, row.answer, row.text + " again") for row in examples]
    sizes = {"test": 200, "validation": 60, "train": 200}
    crossing = pairs_across(divide(examples, sizes, near=False).examples)
    assert crossing > 10
    found = divide(examples, sizes)
    assert pairs_across(found.examples) == 0
    assert found.repeats > 10


def pairs_across(examples: dict[str, list[Example]]) -> int:
    sets = {name: [runs(row.text) for row in rows] for name, rows in examples.items()}
    return sum(
        alike(a, b) >= NEAR
        for one, other in (("test", "train"), ("test", "validation"), ("validation", "train"))
        for a in sets[one]
        for b in sets[other]
    )


def test_exact_repeats_are_taken_once() -> None:
    one = example(1)
    split = split_of(one.group)
    found = divide([one, one, one], {name: 5 for name in SHARES}, near=False)
    assert {name: len(rows) for name, rows in found.examples.items() if rows} == {split: 1}
    assert found.repeats == 2


def test_another_source_is_all_test() -> None:
    far = [example(seed) for seed in range(1000, 1050)]
    found = divide(many(), {**SIZES, "test": 50}, tested=far).examples
    assert {row.text for row in found["test"]} == {row.text for row in far}
    assert len(found["train"]) == SIZES["train"]


def test_splits_are_the_pinned_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = TASKS["rt"]
    task.check()
    changed = json.loads(PINNED.read_text(encoding="utf-8"))
    changed["rt"]["sha256"]["test"] = "0" * 64
    (tmp_path / "splits.json").write_text(json.dumps(changed))
    monkeypatch.setattr("bench.accuracy.tasks.PINNED", tmp_path / "splits.json")
    with pytest.raises(RuntimeError, match="rt are not the pinned ones: test"):
        task.check()


def test_there_are_twelve_tasks_and_each_has_a_prompt() -> None:
    assert len(TASKS) == 12
    for name in TASKS:
        assert "{" in (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")
