"""The twelve tasks: where their examples come from, how they are asked, and how many train, validate and test.

The quicker ones come first. What the splits hold is pinned by ``splits.json``, which ``python -m bench.accuracy.tasks``
writes: a package, a prompt or a rule that changes them is noticed before anything is trained on others.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.accuracy import sources
from bench.accuracy.sources import Example
from bench.accuracy.splits import Splits, divide

PROMPTS = Path(__file__).parent / "prompts"
PINNED = Path(__file__).parent / "splits.json"
CHAT_TEMPLATE = PROMPTS / "chat_template.jinja"
SIZES = {"test": 300, "validation": 240, "train": 300}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Also of its prompt's file.
        title: What it is, for people.
        read: All examples.
        sizes: Split -> examples.
        near: Whether near-duplicates are looked for.
        shift: Where the test examples come from, if not from where the others do.
        generated: Scored on generated text (slots), not on which label is likeliest.
    """

    name: str
    title: str
    read: Callable[[], Iterable[Example]]
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    near: bool = True
    shift: Callable[[], Iterable[Example]] | None = None
    generated: bool = False

    def splits(self) -> Splits:
        """The examples of each split; a function of the packages alone."""
        return _divided(self.name)

    def prompt(self, example: Example) -> str:
        """What the model is asked."""
        template = (PROMPTS / f"{self.name}.txt").read_text(encoding="utf-8").rstrip("\n")
        return template.format(**example.fields)

    def labels(self) -> list[str]:
        """The answers that there are, sorted; none where text is generated."""
        if self.generated:
            return []
        return sorted({example.answer for rows in self.splits().examples.values() for example in rows})

    def lines(self, split: str) -> str:
        """One split as prompt and completion, a JSON object a line."""
        rows = [{"prompt": self.prompt(e), "completion": e.answer} for e in self.splits().examples[split]]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def write(self, split: str, path: Path) -> None:
        """Write one split's lines."""
        path.write_text(self.lines(split), encoding="utf-8")

    def described(self) -> dict[str, Any]:
        """What the splits hold: rows, repeats passed over, the commonest answer's share of the test rows, digests."""
        splits = self.splits()
        answers = Counter(example.answer for example in splits.examples["test"])
        return {
            "rows": {name: len(rows) for name, rows in splits.examples.items()},
            "repeats": splits.repeats,
            "commonest": None if self.generated else max(answers.values()) / answers.total(),
            "sha256": {name: hashlib.sha256(self.lines(name).encode()).hexdigest() for name in splits.examples},
        }

    def check(self) -> None:
        """Compare the splits with those that are pinned.

        Raises:
            RuntimeError: They differ.
        """
        pinned = json.loads(PINNED.read_text(encoding="utf-8"))[self.name]
        found = self.described()
        if found != pinned:
            changed = [split for split, digest in found["sha256"].items() if digest != pinned["sha256"][split]]
            raise RuntimeError(f"the splits of {self.name} are not the pinned ones: {', '.join(changed) or 'counts'}")


TASKS = {
    task.name: task
    for task in (
        Task("sarcasm", "sarcasm (headlines)", sources.sarcasm),
        Task("rt", "sentiment (RT)", functools.partial(sources.reviews, "rotten_tomatoes", 0)),
        Task(
            "shift",
            "sentiment, RT to Amazon and Yelp",
            functools.partial(sources.reviews, "rotten_tomatoes", 1),
            shift=sources.shop_reviews,
        ),
        Task("sense", "word sense (WiC-style)", sources.word_senses),
        Task("social", "common sense (social IQa)", sources.social),
        Task("imdb", "sentiment (IMDB)", functools.partial(sources.reviews, "imdb")),
        Task("topic", "topic (R8)", sources.topics),
        Task("spam", "spam", sources.spam),
        Task(
            "e2e",
            "text to attributes (E2E)",
            sources.restaurants,
            sizes={"test": 120, "validation": 60, "train": 300},
            generated=True,
        ),
        Task("event", "event likelihood (crepe)", sources.events),
        Task("cause", "inference (corr2cause)", sources.causes, near=False),
        Task("logic", "logic (logiqa)", sources.logic),
    )
}


@functools.cache
def _divided(name: str) -> Splits:
    task = TASKS[name]
    tested = task.shift() if task.shift is not None else None
    return divide(task.read(), task.sizes, near=task.near, tested=tested)


def main() -> None:
    """Write what the splits hold."""
    told = {name: task.described() for name, task in TASKS.items()}
    PINNED.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
