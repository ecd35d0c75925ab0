"""Runs what is missing of the accuracy grid, in its order: ``make accuracy``.

    python -m bench.accuracy.run                     # everything; may be stopped and started again at any time
    python -m bench.accuracy.run --stages search     # one stage
    python -m bench.accuracy.run --list              # what is done and what is missing

Every finished run is a row of ``bench/accuracy/results.csv``. Several of these processes may work on one table. Give
each one thread (OMP_NUM_THREADS=1): two runs side by side beat one with two threads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.accuracy import grid
from bench.accuracy.grid import Cell
from bench.accuracy.table import Table
from bench.accuracy.tasks import TASKS
from bench.assets import cache_folder, smollm2

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results.csv"
STAGES = ("trial", "zero-shot", "primary", "search", "searched", "full", "secondary")
WAIT = 5  # seconds until a process looks again whether another's run is done


def cells_of(stage: str, table: Table) -> list[Cell] | None:
    """The cells of a stage; None where a search that it waits for is not whole."""
    fixed = {"trial": grid.trials, "zero-shot": grid.zero_shot, "primary": grid.primary, "search": grid.search}
    fixed["secondary"] = grid.secondary
    if stage in fixed:
        return list(fixed[stage]())
    rows = table.rows()
    if stage == "searched":
        found = grid.searched(rows, list(grid.search()))
        return None if found is None else list(grid.primary(found))
    found = grid.searched(rows, list(grid.full_search()))
    return list(grid.full_search()) if found is None else list(grid.full(found))


def main() -> int:
    """Read the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="say what is done and stop")
    arguments = parser.parse_args()
    table = Table(arguments.results)
    if arguments.list:
        for stage in arguments.stages:
            cells = cells_of(stage, table) or []
            print(f"{stage}: {len({cell.key for cell in cells} & table.keys())} of {len(cells)} runs are done")
        return 0
    smollm2()
    failed: set[str] = set()
    left = arguments.limit
    for stage in arguments.stages:
        left = work(stage, table, failed, left)
    return 1 if failed else 0


def work(stage: str, table: Table, failed: set[str], left: int | None) -> int | None:
    """Do a stage's cells, ``left`` at most, until none is missing but those that failed here; returns what is left."""
    while left is None or left > 0:
        cells = cells_of(stage, table)
        done = table.keys()
        missing = None if cells is None else [c for c in cells if c.key not in done and c.key not in failed]
        if missing == []:
            if stage == "full" and cells is not None and cells[0].stage == "search" and not failed:
                continue  # its search is whole now: its own cells follow
            break
        if missing is None and failed:
            print(f"{stage}: the search that it needs is not whole", file=sys.stderr)
            break
        if missing is None or not take_one(missing, table, failed):
            time.sleep(WAIT)
        elif left is not None:
            left -= 1
    return left


def take_one(missing: Sequence[Cell], table: Table, failed: set[str]) -> bool:
    """Do the first cell that no other process is at; False where there is none."""
    for cell in missing:
        with table.claim(cell.key, cache_folder() / "claims") as held:
            if not held or cell.key in table.keys():
                continue
            try:
                found = in_child(cell)
            except RuntimeError as error:
                print(f"{cell.key}: {error}", file=sys.stderr, flush=True)
                failed.add(cell.key)
                return True
            table.append({**grid.described(cell), **found, "commit": commit()})
            print(f"{cell.key}: {found['score']} ({found['seconds']} s)", flush=True)
            return True
    return False


def in_child(cell: Cell) -> dict[str, Any]:
    """Do a cell in a fork of this process, which has everything imported and nothing loaded.

    Raises:
        RuntimeError: It failed.
    """
    import torch

    import qrosa.train.run

    TASKS[cell.task].check()  # reads the splits, once for all children
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    assert qrosa.train.run.finetune
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(cell, sender))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "the process ended without a word"
    child.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return dict(found)


def _child(cell: Cell, sender: Connection) -> None:
    from bench.accuracy.train import run

    try:
        sender.send(run(cell))
    except Exception:
        sender.send(traceback.format_exc())


def commit() -> str:
    """The commit that the working tree is at, with a plus sign where tracked code differs from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "qrosa", "bench", ":!*.csv"], capture_output=True, check=False
    )
    return name.stdout.strip() + ("+" if changed.returncode else "")


if __name__ == "__main__":
    sys.exit(main())
