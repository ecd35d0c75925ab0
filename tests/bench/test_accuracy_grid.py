"""The grid of the accuracy benchmark: its cells, its order, the rates it finds, and the table that it fills."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from bench.accuracy import grid, run
from bench.accuracy.grid import Cell
from bench.accuracy.score import slot_f1
from bench.accuracy.table import COLUMNS, Table, packed, unpacked
from bench.accuracy.tasks import TASKS
from bench.accuracy.train import FIXED
from qrosa.config import make_run_config


def row(cell: Cell, score: float) -> dict[str, str]:
    return {
        **{name: "" for name in COLUMNS},
        **{k: str(v) for k, v in grid.described(cell).items()},
        "score": str(score),
    }


def test_a_grid_broken_off_is_whole_for_the_seeds_that_are_done() -> None:
    cells = list(grid.primary())
    assert len(cells) == 144
    assert len({cell.key for cell in cells}) == 144
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    first = cells[:48]
    assert {(cell.task, cell.method) for cell in first} == {(task, method) for task in TASKS for method in grid.METHODS}


def test_methods_train_the_same_number_of_parameters() -> None:
    from qrosa.adapters.budget import allocate
    from qrosa.adapters.rank_units import LinearShape

    sizes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    sizes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    linears = [
        LinearShape(f"model.layers.{layer}.{name}", *size, layer) for layer in range(30) for name, size in sizes.items()
    ]
    counts = {}
    for method, settings in grid.METHODS.items():
        config = make_run_config({"model": "m", "output": "o", "data": "d", **FIXED, **settings})
        counts[method] = allocate(config.adapter, linears, 134_515_008).trainable
    most = max(counts.values())
    assert all(count > 0.997 * most for count in counts.values()), counts  # whole ranks leave a few parameters over


def test_every_cell_has_settings_that_qrosa_takes() -> None:
    for cell in [*grid.primary(), *grid.search(), *grid.trials(), *grid.secondary()]:
        make_run_config({"model": "m", "output": "o", "data": "d", "seed": cell.seed, **FIXED, **cell.settings})


def test_searches_are_of_equal_size() -> None:
    cells = list(grid.search())
    sizes = {method: sum(cell.method == method for cell in cells) for method in grid.METHODS}
    assert len(set(sizes.values())) == 1
    assert {cell.split for cell in cells} == {"validation"}
    assert sum(cell.method == "full" for cell in grid.full_search()) == next(iter(sizes.values()))


def test_changes_are_run_on_four_tasks_and_none_twice() -> None:
    cells = list(grid.secondary())
    assert len({cell.key for cell in cells}) == len(cells) == 3 * 4 * len(grid.SECONDARY)
    assert not {cell.key for cell in cells} & {cell.key for cell in grid.primary()}
    assert set(grid.SECONDARY_TASKS) <= set(TASKS)


def test_the_rate_with_the_best_mean_is_found_and_the_lower_one_among_equals() -> None:
    cells = list(grid.search())
    best = dict(zip(grid.METHODS, (*grid.RATES, grid.RATES[0]), strict=False))
    rows = [row(cell, 0.5 + 0.1 * (cell.settings["lr"] == best[cell.method])) for cell in cells]
    assert grid.searched(rows, cells) == best
    assert grid.searched([row(cell, 0.5) for cell in cells], cells) == dict.fromkeys(grid.METHODS, min(grid.RATES))
    assert grid.searched(rows[:-1], cells) is None


def test_cells_at_the_first_rate_are_not_run_twice() -> None:
    same = {cell.key for cell in grid.primary(dict.fromkeys(grid.METHODS, grid.RATE))}
    assert same == {cell.key for cell in grid.primary()}


def test_a_finished_run_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QROSA_ASSETS", str(tmp_path / "cache"))
    table = Table(tmp_path / "results.csv")
    done: list[str] = []
    found = {"score": "0.5", "seconds": "1", "values": "09"}
    monkeypatch.setattr(run, "in_child", lambda cell: done.append(cell.key) or found)
    assert run.work("zero-shot", table, set(), 5) == 0
    assert len(table.rows()) == 5
    assert run.work("zero-shot", table, set(), None) is None
    assert run.work("zero-shot", table, set(), None) is None
    assert len(done) == len(set(done)) == len(TASKS) == len(table.rows())
    assert list(table.rows()[0]) == list(COLUMNS)


def test_a_run_that_fails_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QROSA_ASSETS", str(tmp_path / "cache"))

    def broken(cell: Cell) -> dict[str, str]:
        if cell.task == "rt":
            raise RuntimeError("no")
        return {"score": "0.5", "seconds": "1"}

    monkeypatch.setattr(run, "in_child", broken)
    failed: set[str] = set()
    table = Table(tmp_path / "results.csv")
    run.work("zero-shot", table, failed, None)
    assert len(failed) == 1
    assert len(table.rows()) == len(TASKS) - 1


def hold(path: Path, folder: Path, start: multiprocessing.Event, stop: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with Table(path).claim("key", folder) as held:
        assert held
        start.set()  # type: ignore[attr-defined]
        stop.wait(30)  # type: ignore[attr-defined]


def test_two_processes_never_do_the_same_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, stop = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "t.csv", tmp_path / "claims", start, stop))
    other.start()
    table = Table(tmp_path / "t.csv")
    try:
        assert start.wait(60)
        with table.claim("key", tmp_path / "claims") as held:
            assert not held
        with table.claim("another", tmp_path / "claims") as held:
            assert held
    finally:
        other.kill()  # as a run that is broken off: its claim goes with it
        other.join()
    with table.claim("key", tmp_path / "claims") as held:
        assert held


def test_scores_of_rows_go_through_the_table(tmp_path: Path) -> None:
    values = (1.0, 0.0, 0.0, 1.0, 0.5)
    assert unpacked(packed(values))[:4] == [1.0, 0.0, 0.0, 1.0]
    assert unpacked(packed(values))[4] == pytest.approx(0.5, abs=0.06)
    table = Table(tmp_path / "t.csv")
    table.append({"key": "a,b", "values": packed(values)})
    table.append({"key": "c", "values": "0123"})
    assert [line["values"] for line in table.rows()] == [packed(values), "0123"]
    assert table.keys() == {"a,b", "c"}
    with pytest.raises(ValueError):
        table.append({"unknown": 1})
    assert len(table.rows()) == 2


def test_slot_f1() -> None:
    wanted = "name: The Eagle, eatType: coffee shop, near: Burger King"
    assert slot_f1(wanted, wanted) == 1.0
    assert slot_f1("near: Burger King, name: The Eagle, eatType: coffee shop", wanted) == 1.0
    assert slot_f1("name: The Eagle, eatType: pub, near: Burger King", wanted) == pytest.approx(2 / 3)
    assert slot_f1("name: The Eagle", wanted) == pytest.approx(0.5)
    assert slot_f1("nothing of the kind", wanted) == 0.0
    assert slot_f1("", "") == 0.0
