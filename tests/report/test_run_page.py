"""report.html of a run: what happened stands across its curves, and what it was made on below them."""

from __future__ import annotations

import re
from typing import Any

from qrosa.data.batching import Limits
from qrosa.optim.schedule import Phases
from qrosa.record.state import RunState
from qrosa.report.facts import Facts, ModuleShare
from qrosa.report.page import page
from qrosa.report.report import figures

SETTINGS = {
    "output": "run", "lr": 1e-3, "sparse_lr": 1e-3, "schedule": "linear", "lr_warmup": 0.1, "keep_best": True,
    "data": ["rows.jsonl"],
}  # fmt: skip


def make_facts(**state: Any) -> Facts:
    changed: dict[str, Any] = {"step": 40, "selected_at": 10, "first_loss": 4.0, "last_loss": 1.0, **state}
    return Facts(
        settings=SETTINGS,
        base={"source": "m", "parameters": 1000},
        phases=Phases(10, 40, True),
        state=RunState(Limits(1, 8), 8, 8, **changed),
        planned={"train": 100},
        modules=[ModuleShare("model.layers.0.q_proj", 0, 2, 5, 100, 0.1)],
        where=["all"],
        data={},
        trainable=10,
        machine={"processor": "a <fast> one, 2 threads", "torch": "2.13"},
    )


def lines(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "phase": "train", "loss": 4.0 / step, "tokens_per_s": 5.0, "grad_norm": 1.0, "memory": 9}
        for step in range(1, steps + 1)
    ]


def made(facts: Facts, steps: int = 40) -> str:
    evals = [{"step": 20, "loss": 0.5}, {"step": 40, "loss": 0.75}]
    return page(facts, figures(facts), lines(steps), evals)


def chart(text: str, heading: str) -> str:
    found = re.search(rf"<h2>{heading}</h2>(.*?)</section>", text)
    assert found
    return found[1]


def test_what_happened_stands_across_the_curves() -> None:
    text = made(make_facts(resumed_at=[15, 30], best={"step": 20, "loss": 0.5, "rows": 1, "perplexity": 1.6}))
    for heading in ("Loss", "Tokens per second", "Learning rates"):
        shown = chart(text, heading)
        drawings = shown.count("<svg")
        assert shown.count('class="event"') == 4 * drawings
        assert shown.count(">resumed<") == 2 * drawings
        assert shown.count(">warm-up ends, masks picked<") == shown.count(">best: the adapter<") == drawings
    assert 'class="event"' not in made(make_facts(selected_at=0))


def test_a_long_run_has_a_smoothed_loss_on_two_scales() -> None:
    shown = chart(made(make_facts()), "Loss")
    assert shown.count('type="radio"') == 2 and shown.count("<svg") == 2
    assert shown.count('class="line s1 faint"') == 2 and "training, mean of 4 steps" in shown
    short = chart(made(make_facts(step=8), steps=8), "Loss")
    assert "faint" not in short and "mean of" not in short


def test_machine_and_settings_stand_at_the_end() -> None:
    text = made(make_facts())
    assert "<script" not in text and "http" not in text
    end = text[text.index("<summary>Machine") :]
    assert "a &lt;fast&gt; one, 2 threads" in end and "2.13" in end
    assert "<summary>Settings</summary>" in end and "sparse_lr" in end
