"""What is run: cells of the grid, in the order in which they should be done.

A cell is one training run and its score. The stages:

    search      every method at every rate, on the validation splits of three tasks; it decides the rates
    zero-shot   the 4-bit base as it is
    primary     budget 0.3%, every task and method, all of seed 0 before any of seed 1: a grid broken off is whole
                for the seeds that are done
    share       low-rank + sparse at other sparse shares, on four tasks
    full        all parameters in 16 bits, the ceiling, on its own searched rate

Methods train the same number of parameters, on the same rows and the same 4-bit base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from bench.accuracy.tasks import TASKS

BUDGET = "0.3%"
SEARCH_TASKS = ("rt", "sarcasm", "social")
SHARE_TASKS = ("rt", "sarcasm", "topic", "event")
SEEDS = (0, 1, 2)
RATES = (1.5e-3, 3e-3, 6e-3)
"""Of the low-rank part; the sparse part's is a third of it."""
FULL_RATES = (1e-5, 3e-5, 1e-4)

METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"sparse_share": 0.0},
    "sparse": {"sparse_share": 1.0},
    "both": {"sparse_share": 0.5},
    "random": {"sparse_share": 0.5, "mask_score": "random"},
}
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


def variants() -> Iterator[Cell]:
    """Where the budget goes, at the middle rate: what ``METHODS`` holds was chosen by these."""
    for task in SEARCH_TASKS:
        for share in (0.5, 0.25):
            for order in ("sensitivity", "order"):
                settings = {"sparse_share": share, "rank_by": order, **rates(RATES[1])}
                yield Cell("search", task, "both", 0, "validation", settings)


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


def primary(found: Mapping[str, float], seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """The grid itself, at the searched rates."""
    for seed in seeds:
        for task in TASKS:
            for method, settings in METHODS.items():
                yield Cell("primary", task, method, seed, "test", {**settings, **rates(found[method])})


def full(found: Mapping[str, float]) -> Iterator[Cell]:
    """The ceiling, one seed."""
    for task in TASKS:
        yield Cell("full", task, "full", 0, "test", {"lr": found["full"]})


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
