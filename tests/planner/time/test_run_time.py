"""Hours of a run: steps by the rows, and seconds that grow with what they are spent on."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console

from bench.real_models import MODELS
from qrosa.base.shape import from_config
from qrosa.cli.plan_extras import show_reach
from qrosa.planner.cards import CARDS, Machines
from qrosa.planner.show import document
from qrosa.planner.time.run_time import RunTime, duration, run_time
from tests.plans import GB, made

LLAMA = from_config("Llama-3.1-8B", MODELS["Llama-3.1-8B"].config)
ROWS = {"longest_row": 2048, "row_tokens": 4_000_000, "row_count": 10_000}


def timed(card: str = "rtx4090", **changes: Any) -> RunTime:
    plan = made(LLAMA, vram=None, machines=Machines(CARDS[card]), **(ROWS | changes))
    found = run_time(plan)
    assert found is not None
    return found


def test_steps_and_tokens_are_those_of_the_rows() -> None:
    found = timed(epochs=3, batch_size=16)
    assert (found.steps, found.tokens) == (1875, 1875 * 16 * 400)
    assert timed(max_steps=7, batch_size=16).steps == 7
    assert timed(epochs=1, batch_size=16, eval_split="10%").steps == 563


def test_each_phase_grows_with_its_own() -> None:
    base = timed(epochs=1, batch_size=16, mask_samples=64)
    more = timed(epochs=3, batch_size=16, mask_samples=64)
    assert more.seconds["train"] > 2.5 * base.seconds["train"]
    assert more.seconds["select"] == base.seconds["select"] > 0
    assert timed(epochs=1, batch_size=16, mask_samples=256).seconds["select"] > 2 * base.seconds["select"]
    assert base.seconds["eval"] == 0 < timed(epochs=1, batch_size=16, eval_split="10%").seconds["eval"]
    assert timed(save_every=1, batch_size=16).seconds["save"] > 10 * base.seconds["save"]
    assert timed("rtx3090", epochs=1, batch_size=16).seconds["train"] > base.seconds["train"]
    assert list(base.seconds) == ["load", "warmup", "select", "train", "eval", "save", "export"]


def test_judging_by_held_out_rows_costs_evaluations_and_saves() -> None:
    base = timed(epochs=1, batch_size=16, eval_split="10%")
    judged = timed(epochs=1, batch_size=16, eval_split="10%", stop_after=3)
    kept = timed(epochs=1, batch_size=16, eval_split="10%", keep_best=True)
    assert judged.seconds["eval"] == kept.seconds["eval"] > 15 * base.seconds["eval"]
    assert kept.seconds["save"] > 2 * base.seconds["save"]
    assert judged.seconds["save"] == base.seconds["save"]
    given = timed(epochs=1, batch_size=16, eval_split="10%", eval_every=500, stop_after=3)
    assert given.seconds["eval"] == pytest.approx(2 * base.seconds["eval"])


def test_answers_to_samples_take_time_and_a_cache() -> None:
    base, asked = timed(epochs=1, batch_size=16), timed(epochs=1, batch_size=16, samples=4)
    assert 2 < asked.seconds["eval"] - base.seconds["eval"] < 120
    streamed = run_time(made(LLAMA, vram=6 * GB, machines=Machines(CARDS["rtx3060"]), samples=4, **ROWS))
    assert streamed is not None and streamed.seconds["eval"] > 3 * timed("rtx3060", samples=4).seconds["eval"]
    plain, asked_plan = made(LLAMA, seq_len=2048), made(LLAMA, seq_len=2048, samples=4)
    assert "cache" not in plain.phases["eval"].device
    assert asked_plan.phases["eval"].device_total >= plain.phases["eval"].device_total
    assert asked_plan.phases["train"] == plain.phases["train"]


def test_the_best_checkpoint_takes_the_disk_of_one_more() -> None:
    disk = {keep: made(LLAMA, keep=keep).phases["save"].disk for keep in (2, 3)}
    assert made(LLAMA, keep=2, keep_best=True).phases["save"].disk == disk[3] > disk[2]


def test_without_a_mask_nothing_is_selected() -> None:
    found = timed(batch_size=16, sparse_share=0.0)
    assert found.seconds["select"] == found.seconds["warmup"] == 0


def test_an_8b_run_takes_hours_and_its_selection_minutes() -> None:
    """Four million tokens at the two thousand a second that people report of an 8B model on a 4090."""
    found = timed(epochs=1, batch_size=16)
    assert 1000 < found.seconds["train"] + found.seconds["warmup"] < 4000
    assert 10 < found.seconds["select"] < 120


def test_nothing_is_said_without_rows_or_a_card() -> None:
    assert run_time(made(LLAMA, vram=None, machines=Machines(CARDS["rtx4090"]))) is None
    assert run_time(made(LLAMA, **ROWS)) is None


def test_it_is_shown_and_in_the_document() -> None:
    plan = made(LLAMA, vram=None, machines=Machines(CARDS["rtx4090"]), **ROWS)
    found = run_time(plan)
    assert found is not None
    shown = document(plan)["estimate"]["run"]
    assert shown["total_seconds"] == pytest.approx(sum(shown["seconds"].values())) == pytest.approx(found.total)
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    show_reach(plan, console)
    text = console.export_text()
    assert found.describe() in text.replace("\n", " ") or found.describe()[:60] in text
    assert re.search(r"est\. training", text)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (300, "5 min"), (5400, "1 h 30 min"), (90_000, "25 h 00 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
