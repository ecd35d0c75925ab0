"""Accuracy and exact match against the plain way: a whole forward pass for each row and label, and `generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qrosa.data.dataset import load_rows
from qrosa.data.encode import EncodedRow
from qrosa.eval.perplexity import evaluate_loss
from qrosa.eval.tasks import evaluate_tasks, find_labels
from tests.conftest import TINY_FAMILIES, save_tiny_model
from tests.eval.conftest import LoadTiny, label_row, label_rows

END = (2,)  # <|im_end|>
LABELS = {
    "one token": ([40], [50], [60]),
    "several tokens": ([40, 41], [50, 51, 52], [40, 61]),
    "one inside another": ([40], [40, 41], [50]),
}


def _plain_accuracy(model: Any, rows: Sequence[EncodedRow], labels: Sequence[Sequence[int]]) -> float:
    right = 0
    for row in rows:
        prompt, scores = row.prompt_ids(), []
        for label in labels:
            ids = torch.tensor([[*prompt, *label]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(log_probs.gather(1, ids[0, len(prompt) :, None]).sum()))
        best = list(labels[max(range(len(labels)), key=scores.__getitem__)])
        right += best in (row.input_ids[row.prompt_len : row.answer_end], row.completion_ids())
    return right / len(rows)


def _plain_exact(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], limit: int) -> float:
    same = 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids()])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=3
        )
        text = tokenizer.decode(made[0, row.prompt_len :], skip_special_tokens=True).strip()
        same += text == tokenizer.decode(row.completion_ids(), skip_special_tokens=True).strip()
    return same / len(rows)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("kind", LABELS)
def test_equals_the_plain_way(kind: str, family: str, tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model, labels = tiny_model(family), LABELS[kind]
    rows = label_rows(labels, END)
    result = evaluate_tasks(model, tiny_tokenizer, rows, max_tokens=200)
    scored = [[*label, *END] for label in labels] if kind == "one inside another" else labels
    assert result["accuracy"] == _plain_accuracy(model, rows, scored)
    expected = evaluate_loss(model, rows)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (result["rows"], result["supervised_tokens"]) == (24, expected["supervised_tokens"])


def test_attention_windows_shorter_than_the_prompts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for family in ("gemma3_text", "mistral"):
        save_tiny_model(family, tmp_path / family, tiny_tokenizer, sliding_window=8)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        rows = label_rows(LABELS["several tokens"], END)
        result = evaluate_tasks(model, tiny_tokenizer, rows)
        assert result["accuracy"] == _plain_accuracy(model, rows, LABELS["several tokens"])
        assert result["loss"] == pytest.approx(evaluate_loss(model, rows)["loss"], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_exact_match_is_that_of_generate(family: str, tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model = tiny_model(family)
    rows = []
    for index, row in enumerate(label_rows(LABELS["several tokens"], END, count=16)):
        answer = row.input_ids[row.prompt_len : row.answer_end]
        if index % 2:  # what the model itself would say, so that some rows match
            ids = torch.tensor([row.prompt_ids()])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            answer = [token for token in made[0, row.prompt_len :].tolist() if token not in END]
        rows.append(label_row(row.prompt_ids(), answer, END))
    result = evaluate_tasks(model, tiny_tokenizer, rows)
    longest = max(len(row.completion_ids()) for row in rows)
    assert result["exact_match"] == _plain_exact(model, tiny_tokenizer, rows, longest + 2)


def test_a_model_that_knows_scores_one(tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any) -> None:
    """Trained on four rows until it knows them, a model gets all of them right in both ways."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    rows = label_rows(LABELS["several tokens"], END, count=4)
    before = evaluate_tasks(model, tiny_tokenizer, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for row in rows:
            model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate_tasks(model, tiny_tokenizer, rows)
    assert before["exact_match"] == 0.0
    assert after["accuracy"] == after["exact_match"] == 1.0 and after["loss"] < 0.1


@pytest.mark.parametrize(
    "rows, applies",
    [
        (label_rows([[40], [50]]), True),
        (label_rows([[40], [40]]), False),
        (label_rows([[40 + index] for index in range(64)], count=64), True),
        (label_rows([[40 + index] for index in range(65)], count=65), False),
        (label_rows([[40] * 32, [50]]), True),
        (label_rows([[40] * 33, [50]]), False),
        ([*label_rows([[40], [50]]), EncodedRow([5, 6, 7], [-100, 6, 7])], False),
        ([*label_rows([[40], [50]]), label_row([], [40])], False),
    ],
    ids=["two", "one", "64", "65", "32 tokens", "33 tokens", "a text row", "no prompt"],
)
def test_where_a_label_set_applies(
    rows: list[EncodedRow], applies: bool, tiny_model: LoadTiny, tiny_tokenizer: Any
) -> None:
    assert (find_labels(rows) is not None) is applies
    if not applies and len(rows) < 30:
        result = evaluate_tasks(tiny_model("llama"), tiny_tokenizer, rows)
        assert result["accuracy"] is None and result["exact_match"] is None and result["loss"] > 0


def test_loss_on_all_tokens_is_measured_on_all_tokens(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    rows = label_rows([[40], [50]], END)
    for row in rows:
        row.labels = [-100, *row.input_ids[1:]]
    result = evaluate_tasks(tiny_model("llama"), tiny_tokenizer, rows)
    assert result["accuracy"] is not None
    assert result["loss"] == pytest.approx(evaluate_loss(tiny_model("llama"), rows)["loss"])
    assert result["supervised_tokens"] == sum(len(row.input_ids) - 1 for row in rows)


def test_mode_is_kept_and_the_order_of_rows_does_not_matter(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model, rows = tiny_model("qwen3"), label_rows(LABELS["several tokens"], END)
    forward = evaluate_tasks(model, tiny_tokenizer, rows, max_tokens=100)
    backward = evaluate_tasks(model, tiny_tokenizer, rows[::-1], max_tokens=1000)
    assert not model.training
    assert forward["accuracy"] == backward["accuracy"] and forward["loss"] == pytest.approx(backward["loss"])


def test_reviews_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 tells good from bad far above chance, quickly."""
    from qrosa.base.load import load_base

    good = ("wonderful", "brilliant", "superb", "a delight", "excellent", "great fun")
    bad = ("awful", "a disaster", "terrible", "boring", "a mess", "dreadful")
    lines = [
        {"prompt": f"Is this review positive or negative? Review: the film was {word}.", "completion": label}
        for label, words in (("positive", good), ("negative", bad))
        for word in words
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, tokenizer = load_base(str(smollm2))
    rows = load_rows(str(path), tokenizer, seq_len=128, train_on="completion").rows
    started = time.monotonic()
    result = evaluate_tasks(model, tokenizer, rows)
    assert time.monotonic() - started < 60
    assert result["accuracy"] is not None and result["accuracy"] >= 0.75
    assert result["loss"] == pytest.approx(evaluate_loss(model, rows)["loss"], rel=0.05)
