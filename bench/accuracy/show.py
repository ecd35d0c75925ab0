"""Tables and a plot of the accuracy grid for ``docs/accuracy.md``, from the table of finished runs alone.

    python -m bench.accuracy.show        # writes docs/accuracy.svg; the tables are bench/tables.py's to write

A seed of a task counts once all methods have run on it; what is missing is always said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from bench.accuracy import grid
from bench.accuracy.grid import METHODS, SEEDS, TITLES, Cell
from bench.accuracy.run import RESULTS, STAGES, cells_of
from bench.accuracy.statistics import average_ranks, row_differences, sign_flip_p, standard_error
from bench.accuracy.table import Table, unpacked
from bench.accuracy.tasks import PINNED, TASKS

Row = Mapping[str, str]
PLOT = Path(__file__).resolve().parent.parent.parent / "docs" / "accuracy.svg"
COLOURS = {"low-rank": "#4477aa", "sparse": "#ccbb44", "both": "#228833", "random": "#ee6677", "zero-shot": "#999999"}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(["---"] + ["---:"] * (len(headings) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


class Grid:
    """The finished runs, looked up by cell.

    Args:
        table: Where they stand.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.rows = {row["key"]: row for row in table.rows()}

    def done(self, cells: Sequence[Cell]) -> int:
        """How many of these cells are finished."""
        return sum(cell.key in self.rows for cell in cells)

    def whole(self) -> dict[str, dict[int, dict[str, Row]]]:
        """Task -> seed -> method -> row of the primary grid, where all methods have run; tasks in order."""
        found: dict[str, dict[int, dict[str, Row]]] = {}
        for cell in grid.primary():
            if cell.key in self.rows:
                found.setdefault(cell.task, {}).setdefault(cell.seed, {})[cell.method] = self.rows[cell.key]
        kept = {
            task: {seed: rows for seed, rows in seeds.items() if len(rows) == len(METHODS)}
            for task, seeds in found.items()
        }
        return {task: kept[task] for task in TASKS if kept.get(task)}

    def untrained(self) -> dict[str, float]:
        """Task -> score of the 4-bit base, where it was taken."""
        return {cell.task: float(self.rows[cell.key]["score"]) for cell in grid.zero_shot() if cell.key in self.rows}


def state(found: Grid) -> str:
    """What has run of each stage, and what has not."""
    rows = []
    for stage in STAGES:
        cells = cells_of(stage, found.table)
        if cells is None:
            rows.append([f"`{stage}`", "waits for the search", ""])
        else:
            done = found.done(cells)
            rows.append([f"`{stage}`", str(done), str(len(cells) - done)])
    primary = list(grid.primary())
    seeds = [f"seed {s}: {found.done([c for c in primary if c.seed == s])} of {len(primary) // 3}" for s in SEEDS]
    return markdown(["stage", "runs done", "missing"], rows) + f"\nOf the primary grid, {', '.join(seeds)}.\n"


def splits(found: Grid) -> str:
    """What the tasks' splits hold."""
    pinned, rows = json.loads(PINNED.read_text(encoding="utf-8")), []
    for name, task in TASKS.items():
        told = pinned[name]
        counts = [str(told["rows"][split]) for split in ("train", "validation", "test")]
        most = "" if told["commonest"] is None else f"{told['commonest']:.3f}"
        rows.append([task.title, *counts, str(told["repeats"]), most])
    headings = ["task", "train", "validation", "test", "repeats passed over", "commonest answer, test"]
    return markdown(headings, rows)


def trial(found: Grid) -> str:
    """Where the budget goes, on validation splits."""
    rows = []
    for cell in grid.trials():
        if cell.key in found.rows:
            row = found.rows[cell.key]
            share, order = cell.settings["sparse_share"], cell.settings["rank_by"]
            rows.append([TASKS[cell.task].title, f"{share:g}", order, f"{float(row['score']):.3f}", row["loss"][:5]])
    return markdown(["task", "sparse share", "`--rank-by`", "accuracy", "loss"], rows)


def search(found: Grid) -> str:
    """Methods at each rate, on validation splits: mean over the search's tasks that have all cells."""
    rows = []
    for rate in grid.RATES:
        cells = [cell for cell in grid.search() if cell.settings["lr"] == rate and cell.key in found.rows]
        tasks = [t for t in grid.SEARCH_TASKS if sum(cell.task == t for cell in cells) == len(METHODS)]
        scores = [
            mean(float(found.rows[cell.key]["score"]) for cell in cells if cell.method == method and cell.task in tasks)
            if tasks
            else None
            for method in METHODS
        ]
        rows.append([f"{rate:g}", *("" if s is None else f"{s:.3f}" for s in scores), ", ".join(tasks) or "none yet"])
    return markdown(["rate", *(TITLES[method] for method in METHODS), "tasks"], rows)


def primary(found: Grid) -> str:
    """Scores by task, over the seeds that are whole."""
    untrained, rows = found.untrained(), []
    for task, seeds in found.whole().items():
        scores = by_method(seeds)
        differences = row_differences(values(seeds, "both"), values(seeds, "low-rank"))
        rows.append(
            [
                TASKS[task].title,
                str(len(seeds)),
                next(iter(next(iter(seeds.values())).values()))["rows"],
                f"{untrained[task]:.3f}" if task in untrained else "",
                *(f"{mean(scores[method]):.3f}" for method in METHODS),
                f"{mean(scores['both']) - mean(scores['low-rank']):+.3f}",
                f"{sign_flip_p(differences):.2f}",
            ]
        )
    headings = ["task", "seeds", "rows", "untrained", *(TITLES[m] for m in METHODS), "both - low-rank", "p"]
    return markdown(headings, rows)


def summary(found: Grid) -> str:
    """Means over the tasks that are there, differences from low-rank + sparse, and average ranks."""
    whole = found.whole()
    if not whole:
        return "No task has run with all methods yet.\n"
    means = {task: {m: mean(s) for m, s in by_method(seeds).items()} for task, seeds in whole.items()}
    ranks, rows = average_ranks(means), []
    for method in METHODS:
        differences = [scores["both"] - scores[method] for scores in means.values()]
        own = method == "both"
        rows.append(
            [
                TITLES[method],
                f"{mean(scores[method] for scores in means.values()):.3f}",
                "" if own else f"{mean(differences):+.3f} ± {standard_error(differences):.3f}",
                "" if own else f"{sign_flip_p(differences):.3f}",
                f"{ranks[method]:.2f}",
            ]
        )
    seeds = sorted({len(seeds) for seeds in whole.values()})
    text = (
        f"\nOver {len(whole)} of {len(TASKS)} tasks, {' or '.join(map(str, seeds))} of {len(SEEDS)} seeds each. The "
        "difference is low-rank + sparse less the method, ± its standard error over tasks; p by flipping its signs.\n"
    )
    if len(whole) < len(TASKS) or seeds != [len(SEEDS)]:
        text += "**The grid is not whole**: this is what there is, not the result.\n"
    return markdown(["method", "mean score", "both - method", "p", "average rank"], rows) + text


def secondary(found: Grid) -> str:
    """Each change against low-rank + sparse of the primary grid, on the same tasks and seeds."""
    cells = list(grid.secondary())
    primary_cells = {(cell.task, cell.seed): cell for cell in grid.primary() if cell.method == "both"}
    rows = []
    for place, name in enumerate(grid.SECONDARY):
        pairs = [
            (float(found.rows[cell.key]["score"]), float(found.rows[other.key]["score"]))
            for cell in cells[place :: len(grid.SECONDARY)]
            if cell.key in found.rows and (other := primary_cells[cell.task, cell.seed]).key in found.rows
        ]
        if pairs:
            differences = [score - other for score, other in pairs]
            error = f" ± {standard_error(differences):.3f}" if len(pairs) > 1 else ""
            rows.append([name, str(len(pairs)), f"{mean(s for s, _ in pairs):.3f}", f"{mean(differences):+.3f}{error}"])
    if not rows:
        return "None has run yet.\n"
    most = len(grid.SECONDARY_TASKS) * len(SEEDS)
    text = f"\nOf {most} runs each. The difference is to low-rank + sparse at 0.3%, share 0.5, run by run.\n"
    return markdown(["change", "runs", "mean score", "change - low-rank + sparse"], rows) + text


def cost(found: Grid) -> str:
    """What a run takes: medians would hide the load of the machine, so the least and the most are given."""
    rows = []
    for method in METHODS:
        own = [r for r in found.rows.values() if r["stage"] == "primary" and r["method"] == method]
        if own:
            seconds = sorted(float(row["seconds"]) for row in own)
            speeds = sorted(float(row["tokens_per_s"]) for row in own)
            peaks = sorted(int(row["peak_bytes"]) / 2**30 for row in own)
            trained = sorted({int(row["trainable"]) for row in own})
            rows.append(
                [
                    TITLES[method],
                    " to ".join(f"{count:,}" for count in dict.fromkeys((trained[0], trained[-1]))),
                    f"{seconds[0]:.0f} to {seconds[-1]:.0f}",
                    f"{speeds[0]:.0f} to {speeds[-1]:.0f}",
                    f"{peaks[0]:.2f} to {peaks[-1]:.2f}",
                ]
            )
    return markdown(["method", "parameters trained", "seconds", "tokens/s", "peak, GiB"], rows)


def by_method(seeds: Mapping[int, Mapping[str, Row]]) -> dict[str, list[float]]:
    """Method -> scores of a task, a seed each."""
    return {method: [float(rows[method]["score"]) for rows in seeds.values()] for method in METHODS}


def values(seeds: Mapping[int, Mapping[str, Row]], method: str) -> list[list[float]]:
    """Seed -> row -> score of one method on a task."""
    return [unpacked(rows[method]["values"]) for rows in seeds.values()]


def plot(found: Grid) -> str:
    """SVG: each task a line, each method a dot with the standard error over its rows (of seed means)."""
    whole, untrained = found.whole(), found.untrained()
    left, right, step = 250, 40, 34
    width, height = 760, 60 + step * len(whole)

    def across(score: float) -> float:
        return left + (width - left - right) * score

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for score in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(score)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="24" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{score:g}</text>')
    for place, (task, seeds) in enumerate(whole.items()):
        middle = 40 + step * place
        parts.append(f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{TASKS[task].title}</text>')
        if task in untrained:
            parts.append(_dot(across(untrained[task]), middle, "zero-shot"))
        for index, method in enumerate(METHODS):
            rows = [mean(row) for row in zip(*values(seeds, method), strict=True)]
            score, error = mean(by_method(seeds)[method]), standard_error(rows)
            y = middle - 9 + 6 * index
            low, high = across(max(0.0, score - error)), across(min(1.0, score + error))
            parts.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{COLOURS[method]}" stroke-width="2"/>'
            )
            parts.append(_dot(across(score), y, method))
    for place, (method, colour) in enumerate(COLOURS.items()):
        x = 12 + 165 * place if place < 4 else 690
        name = TITLES[method] if place < 4 else "untrained"
        parts.append(f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/><text x="{x + 8}" y="16">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(x: float, y: float, method: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{COLOURS[method]}"><title>{TITLES[method]}</title></circle>'


TABLES = {
    "accuracy-state": state,
    "accuracy-splits": splits,
    "accuracy-trial": trial,
    "accuracy-search": search,
    "accuracy-primary": primary,
    "accuracy-summary": summary,
    "accuracy-secondary": secondary,
    "accuracy-cost": cost,
}


def main() -> None:
    """Write the plot."""
    PLOT.write_text(plot(Grid(Table(RESULTS))), encoding="utf-8")


if __name__ == "__main__":
    main()
