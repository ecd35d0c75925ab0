"""The tables of the accuracy grid, from runs made up for it: what is missing is said, and what is there is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.accuracy import grid, show
from bench.accuracy.grid import METHODS, Cell
from bench.accuracy.table import Table, packed
from bench.accuracy.tasks import TASKS

SCORES = {"low-rank": 0.6, "sparse": 0.5, "both": 0.8, "random": 0.7}


def row(cell: Cell, score: float) -> dict[str, Any]:
    values = tuple(float(index < score * 10) for index in range(10))
    told = {"score": score, "values": packed(values), "rows": 10, "loss": 0.5, "seconds": 60, "tokens_per_s": 300}
    return {**grid.described(cell), **told, "peak_bytes": 2**30, "trainable": 1000 + len(cell.method)}


def filled(path: Path, cells: list[Cell]) -> show.Grid:
    table = Table(path)
    for cell in cells:
        table.append(row(cell, SCORES.get(cell.method, 0.3)))
    return show.Grid(table)


def test_half_a_task_is_no_task_and_half_a_grid_is_told(tmp_path: Path) -> None:
    cells = [*grid.primary()][:11]  # two tasks whole, the third with three of its four methods
    found = filled(tmp_path / "t.csv", cells)
    names = list(TASKS)
    assert list(found.whole()) == names[:2]
    assert TASKS[names[2]].title not in show.primary(found)
    assert "not whole" in show.summary(found) and "2 of 12 tasks" in show.summary(found)
    assert "| `primary` | 11 | 133 |" in show.state(found)
    assert "seed 0: 11 of 48" in show.state(found)


def test_a_whole_grid_has_its_figures(tmp_path: Path) -> None:
    found = filled(tmp_path / "t.csv", [*grid.primary(), *grid.zero_shot(), *grid.search()])
    summary = show.summary(found)
    assert "not whole" not in summary
    lines = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[1:] for line in summary.splitlines()}
    assert lines["low-rank"][:3] == ["0.600", "+0.200 ± 0.000", "0.000"]  # 2 / 4096
    assert lines["low-rank + sparse"][:3] == ["0.800", "", ""]
    assert [lines[grid.TITLES[method]][3].rstrip(" |") for method in METHODS] == ["3.00", "4.00", "1.00", "2.00"]
    first = next(line for line in show.primary(found).splitlines() if TASKS["rt"].title in line)
    assert "| 3 | 10 | 0.300 | 0.600 | 0.500 | 0.800 | 0.700 | +0.200 |" in first
    assert "0.800" in show.search(found) and "none yet" not in show.search(found)
    assert "1,008" in show.cost(found)


def test_a_change_is_compared_on_the_runs_that_both_have(tmp_path: Path) -> None:
    cells = list(grid.secondary())
    change = "--low-rank shared"
    own = cells[list(grid.SECONDARY).index(change) :: len(grid.SECONDARY)][:5]  # seed 0 whole, one task of seed 1
    both = [cell for cell in grid.primary() if cell.method == "both" and cell.seed == 0]
    found = filled(tmp_path / "t.csv", [*own, *both])
    assert f"| {change} | 4 | 0.800 | +0.000 ± 0.000 |" in show.secondary(found)
    assert "budget 1%" not in show.secondary(found)


def test_the_plot_has_a_dot_for_every_method_of_every_task(tmp_path: Path) -> None:
    found = filled(tmp_path / "t.csv", [*grid.primary(), *grid.zero_shot()])
    text = show.plot(found)
    assert text.count("<title>") == len(TASKS) * (len(METHODS) + 1)
    assert all(0 <= float(x) <= 760 for x in re.findall(r'cx="([\d.]+)"', text))
    assert show.plot(show.Grid(Table(tmp_path / "none.csv"))).count("<title>") == 0


@pytest.mark.parametrize("name", show.TABLES)
def test_an_empty_table_is_no_error(tmp_path: Path, name: str) -> None:
    assert show.TABLES[name](show.Grid(Table(tmp_path / "none.csv")))
