"""What is run: cells of the grid, in the order in which they should be done.

A cell is one training run and its score. The stages:

    trial       where the budget goes, at ``RATE``, batch size 8 and dropout 0.05 (once the default), on the validation
                splits of two tasks; ``METHODS`` follows it
    zero-shot   the 4-bit base as it is
    primary     budget 0.3%, every task and method at ``RATE``, all of seed 0 before any of seed 1: a grid broken off
                is whole for the seeds that are done
    search      every method at every rate, on the validation splits of three tasks
    searched    the primary grid at the rates that the search finds; cells at ``RATE`` are the primary's own
    full        all parameters in 16 bits, the ceiling, one seed, at a rate searched in the same way
    secondary   other budgets, sparse shares and forms of the low-rank part, on four tasks, all of seed 0 first

``RATE`` is that of earlier trials with this model on other splits; no test split was looked at to choose it. Methods
train the same number of parameters, on the same rows and the same 4-bit base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from bench.accuracy.tasks import TASKS

BUDGET = "0.3%"
SEARCH_TASKS = ("rt", "sarcasm", "topic")
SEEDS = (0, 1, 2)
RATE = 3e-3
RATES = (1.5e-3, RATE, 6e-3)
"""Of the low-rank part; the sparse part's is a third of it."""
FULL_RATES = (1e-5, 3e-5, 1e-4)

METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"sparse_share": 0.0, "rank_by": "order"},
    "sparse": {"sparse_share": 1.0},
    "both": {"sparse_share": 0.5, "rank_by": "sensitivity"},
    "random": {"sparse_share": 0.5, "rank_by": "sensitivity", "mask_score": "random"},
}
TRIALS = (
    ("rt", 0.0, "order"),
    ("rt", 0.0, "sensitivity"),
    ("rt", 0.5, "sensitivity"),
    ("rt", 0.5, "order"),
    ("rt", 0.25, "order"),
    ("rt", 0.25, "sensitivity"),
    ("sarcasm", 0.25, "order"),
    ("sarcasm", 0.5, "sensitivity"),
)
"""Task, sparse share, and what ranks go by."""
SECONDARY_TASKS = ("rt", "sarcasm", "topic", "sense")
SECONDARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"budget {budget}, {method}": (method, {"budget": budget})
        for budget in ("0.1%", "1%")
        for method in ("low-rank", "sparse", "both", "random")
    },
    "sparse share 0.25": ("both", {"sparse_share": 0.25}),
    "sparse share 0.75": ("both", {"sparse_share": 0.75}),
    "--low-rank shared": ("both", {"low_rank": "shared"}),
    "--low-rank singlora": ("both", {"low_rank": "singlora"}),
    "--mask-scope global": ("both", {"mask_scope": "global"}),
    "sparse values start at zero": ("both", {"sparse_init": "zero"}),
}
"""What differs from the primary grid -> method and settings."""
TITLES = {
    "low-rank": "low-rank",
    "sparse": "sparse",
    "both": "low-rank + sparse",
    "random": "low-rank + sparse, random mask",
    "zero-shot": "4-bit base, untrained",
    "full": "all parameters, 16 bits",
}


@dataclass(frozen=True)
class Cell:
    """One run: where it belongs and what it is given.

    Attributes:
        stage: As in this module's docstring.
        task: Name of the task.
        method: A key of ``TITLES``.
        seed: Of data order, initial values, dropout and random masks.
        split: What it is scored on.
        settings: What differs between runs, as qrosa's settings are called.
    """

    stage: str
    task: str
    method: str
    seed: int
    split: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes it this run and no other; a row of the CSV has the same."""
        told = ",".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        return "/".join((self.stage, self.task, self.method, str(self.seed), self.split, told))


def trials() -> Iterator[Cell]:
    """Where the budget goes."""
    for task, share, order in TRIALS:
        settings = {"sparse_share": share, "rank_by": order, "batch_size": 8, "dropout": 0.05, **rates(RATE)}
        yield Cell("trial", task, "both" if share else "low-rank", 0, "validation", settings)


def search() -> Iterator[Cell]:
    """All methods at all rates, seed 0."""
    for task in SEARCH_TASKS:
        for rate in RATES:
            for method, settings in METHODS.items():
                yield Cell("search", task, method, 0, "validation", {**settings, **rates(rate)})


def full_search() -> Iterator[Cell]:
    """Full fine-tuning at as many rates."""
    for task in SEARCH_TASKS:
        for rate in FULL_RATES:
            yield Cell("search", task, "full", 0, "validation", {"lr": rate})


def zero_shot() -> Iterator[Cell]:
    """Every task, untrained."""
    for task in TASKS:
        yield Cell("zero-shot", task, "zero-shot", 0, "test")


def primary(found: Mapping[str, float] | None = None) -> Iterator[Cell]:
    """The grid itself, at these rates, or all at ``RATE``."""
    found = found or dict.fromkeys(METHODS, RATE)
    for seed in SEEDS:
        for task in TASKS:
            for method, settings in METHODS.items():
                yield Cell("primary", task, method, seed, "test", {**settings, **rates(found[method])})


def full(found: Mapping[str, float]) -> Iterator[Cell]:
    """The ceiling, one seed."""
    for task in TASKS:
        yield Cell("full", task, "full", 0, "test", {"lr": found["full"]})


def secondary() -> Iterator[Cell]:
    """What else could be chosen."""
    for seed in SEEDS:
        for task in SECONDARY_TASKS:
            for method, changes in SECONDARY.values():
                yield Cell("secondary", task, method, seed, "test", {**METHODS[method], **rates(RATE), **changes})


def rates(rate: float) -> dict[str, float]:
    """Both learning rates."""
    return {"lr": rate, "sparse_lr": float(f"{rate / 3:.3g}")}


def searched(rows: Sequence[Mapping[str, str]], cells: Sequence[Cell]) -> dict[str, float] | None:
    """Method -> the rate with the best mean score over the search's tasks, the lower rate among equals.

    None as long as the search is not whole.
    """
    scores = {row["key"]: float(row["score"]) for row in rows}
    if any(cell.key not in scores for cell in cells):
        return None
    by_rate: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        by_rate.setdefault((cell.method, cell.settings["lr"]), []).append(scores[cell.key])
    best: dict[str, float] = {}
    for method in dict.fromkeys(cell.method for cell in cells):
        candidates = [(mean(found), -rate) for (name, rate), found in by_rate.items() if name == method]
        best[method] = -max(candidates)[1]
    return best


def described(cell: Cell) -> dict[str, Any]:
    """The cell as columns of the CSV."""
    return {**{k: v for k, v in asdict(cell).items() if k != "settings"}, "key": cell.key}
