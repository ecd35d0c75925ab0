"""One cell: train, score, and what it took. Each runs in a process of its own, so that its memory is its own."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from bench.accuracy.grid import BUDGET, Cell
from bench.accuracy.score import Score, score_labels, score_text
from bench.accuracy.table import packed
from bench.accuracy.tasks import CHAT_TEMPLATE, TASKS, Task
from bench.assets import smollm2

FIXED: dict[str, Any] = {
    "budget": BUDGET,
    "batch_size": 4,
    "epochs": 1,
    "mask_samples": 32,
    "checkpointing": "off",
    "save_every": 10_000,
    "chat_template": str(CHAT_TEMPLATE),
}
"""Of every run that trains part of the parameters; the cell's settings come on top."""


def run(cell: Cell) -> dict[str, Any]:
    """Do a cell; returns its columns of the table but those that say which cell it is."""
    started = time.perf_counter()
    task = TASKS[cell.task]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cell.method == "zero-shot":
            model, tokenizer, facts = _untrained()
        elif cell.method == "full":
            from bench.accuracy.full import train_all

            model, tokenizer, facts = train_all(task, folder, lr=cell.settings["lr"], seed=cell.seed, fixed=FIXED)
        else:
            model, tokenizer, facts = _trained(cell, task, folder)
        score = _scored(model, tokenizer, task, cell.split, folder)
    return {
        "score": f"{score.mean:.5f}",
        "loss": "" if score.loss is None else f"{score.loss:.5f}",
        "exact": "" if score.exact is None else f"{score.exact:.5f}",
        "rows": len(score.values),
        "values": packed(score.values),
        "seconds": f"{time.perf_counter() - started:.1f}",
        **facts,
    }


def _untrained() -> tuple[Any, Any, dict[str, Any]]:
    from qrosa.base.adapter_io import load_run_or_model

    model, tokenizer, _ = load_run_or_model(str(smollm2()))
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return model, tokenizer, {"trainable": 0, "steps": 0}


def _trained(cell: Cell, task: Task, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    import qrosa
    from qrosa.base.adapter_io import load_run_or_model

    task.write("train", folder / "train.jsonl")
    report = qrosa.finetune(
        {
            "model": str(smollm2()),
            "data": str(folder / "train.jsonl"),
            "output": str(folder / "run"),
            "seed": cell.seed,
            **FIXED,
            **cell.settings,
        }
    )
    model, tokenizer, _ = load_run_or_model(str(folder / "run"))
    facts = {
        "trainable": report["trainable"],
        "steps": report["steps"],
        "train_tokens": report["data"]["tokens"],
        "tokens_per_s": f"{report['tokens_per_s']:.0f}",
        "peak_bytes": max(report["memory"]["measured"].values()),
    }
    return model, tokenizer, facts


def _scored(model: Any, tokenizer: Any, task: Task, split: str, folder: Path) -> Score:
    from qrosa.data.dataset import load_rows

    task.write(split, folder / f"{split}.jsonl")
    rows = load_rows(str(folder / f"{split}.jsonl"), tokenizer, seq_len=2048).rows
    model.set_attn_implementation("eager")  # the quicker one here for short rows on a CPU
    if task.generated:
        return score_text(model, tokenizer, rows)
    return score_labels(model, tokenizer, rows, task.labels())
