"""Scores of the accuracy benchmark against the product's own evaluation and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.accuracy.score import score_labels, score_text
from qrosa.base.adapter_io import load_run_or_model
from qrosa.data.dataset import load_rows
from qrosa.data.encode import EncodedRow
from qrosa.eval.generate import Sampling, generate_ids
from qrosa.eval.tasks import evaluate_tasks

Loaded = tuple[Any, Any, list[EncodedRow]]


@pytest.fixture
def loaded(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Loaded:
    """A random model in 4 bits, and rows of very different lengths with two labels."""
    model, tokenizer, _ = load_run_or_model(str(tiny_model_dir("llama")))
    rows = [
        {"prompt": "the film was good " * (1 + index % 7) + str(index), "completion": ("yes", "no")[index % 3 == 0]}
        for index in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model, tokenizer, list(load_rows(str(path), tokenizer, seq_len=200).rows)


def test_labels_are_scored_as_the_product_scores_them(loaded: Loaded) -> None:
    model, tokenizer, rows = loaded
    firsts = {tokenizer.encode(label, add_special_tokens=False)[0] for label in ("no", "yes")}
    assert len(firsts) == 2
    found = score_labels(model, tokenizer, rows, ["no", "yes"])
    # The product sums over all of a label's tokens. Where an answer is its first token alone, both are the same.
    short = [replace(row, answer_end=(row.prompt_len or 0) + 1, turn_end=(row.prompt_len or 0) + 1) for row in rows]
    assert found.mean == pytest.approx(evaluate_tasks(model, tokenizer, short)["accuracy"])
    assert 0 < found.mean < 1
    assert found.loss is not None and found.loss > 0
    # A batch of many and rows one by one: padding has no say.
    alone = [score_labels(model, tokenizer, [row], ["no", "yes"]).values[0] for row in rows]
    assert alone == list(found.values)


def test_labels_that_begin_alike_are_refused(loaded: Loaded) -> None:
    model, tokenizer, rows = loaded
    with pytest.raises(ValueError, match="same token"):
        score_labels(model, tokenizer, rows, ["yes", "yes"])


def test_text_is_generated_as_the_product_generates_it(
    loaded: Loaded, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer, rows = loaded
    rows = rows[:8]
    # In fp32: a random model's best tokens are so close that in bf16 the size of a batch decides between them.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    made: list[str] = []
    monkeypatch.setattr("bench.accuracy.score.slot_f1", lambda text, wanted: made.append(text) or 0.5)
    monkeypatch.setattr("bench.accuracy.score.ANSWER_TOKENS", 6)
    found = score_text(model, tokenizer, rows)
    assert found.values == (0.5,) * len(rows)
    order = sorted(range(len(rows)), key=lambda index: rows[index].prompt_len or 0, reverse=True)
    for index, text in zip(order, made, strict=True):
        prompt = rows[index].input_ids[: rows[index].prompt_len]
        assert text.strip() == generate_ids(model, tokenizer, prompt, Sampling(max_new_tokens=6, temperature=0.0)).text
