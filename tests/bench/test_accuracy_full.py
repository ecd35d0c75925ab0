"""The ceiling of the accuracy benchmark learns, and is what its settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.accuracy.full import train_all
from bench.accuracy.score import score_labels
from bench.accuracy.sources import Example
from bench.accuracy.splits import Splits
from bench.accuracy.tasks import CHAT_TEMPLATE, Task
from qrosa.data.dataset import load_rows


def told(index: int) -> Example:
    return Example({"text": f"{('good', 'bad')[index % 2]} film {index}"}, ("yes", "no")[index % 2], str(index))


class Told(Task):
    """A task whose answer stands in the prompt; the test rows are others."""

    def splits(self) -> Splits:
        rows = {"train": [told(index) for index in range(64)], "test": [told(index) for index in range(100, 164)]}
        return Splits(rows)


def test_all_parameters_learn(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.accuracy.full.smollm2", tiny_model_dir)
    task = Told("rt", "told", list)
    fixed: dict[str, Any] = {"batch_size": 4, "epochs": 2, "chat_template": str(CHAT_TEMPLATE)}
    model, tokenizer, facts = train_all(task, tmp_path, lr=3e-3, seed=0, fixed=fixed)
    assert facts["steps"] == 32
    assert facts["trainable"] == sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    task.write("test", tmp_path / "test.jsonl")
    rows = load_rows(str(tmp_path / "test.jsonl"), tokenizer, seq_len=200).rows
    assert score_labels(model, tokenizer, rows, ["no", "yes"]).mean > 0.9
    untouched, _, _ = train_all(task, tmp_path, lr=0.0, seed=0, fixed={**fixed, "epochs": 1})
    assert score_labels(untouched, tokenizer, rows, ["no", "yes"]).mean < 0.9
