"""Held-out prompts answered before and after training: what the weights say, and nothing else changes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qrosa.base.adapter_io import load_run_or_model
from qrosa.data.encode import EncodedRow
from qrosa.errors import InterruptedRunError
from qrosa.eval.generate import Sampling, generate_ids
from qrosa.train import samples
from qrosa.train.run import finetune
from tests.train.conftest import losses
from tests.train.test_resume import Stop


def made_row(prompt_len, length=4):
    return EncodedRow([1] * length, [-100] * length, prompt_len=prompt_len)


def test_rows_without_a_prompt_or_an_answer_are_passed_over():
    rows = [made_row(None), made_row(0), made_row(4), made_row(2), made_row(3), made_row(1)]
    assert samples.with_prompts(rows, 1, 2) == rows[3:5]
    assert samples.with_prompts(rows, 2, 9) == [rows[4]]  # the first of each pair
    assert samples.with_prompts([], 1, 3) == []


def test_answers_are_those_of_the_model_and_training_is_the_same(config, tmp_path, monkeypatch):
    changes = {"max_steps": 12, "eval_split": "25%", "warmup_steps": 2, "lr": 0.02}
    plain, asked = config(output=str(tmp_path / "plain"), **changes), config(samples=2, **changes)
    finetune(plain)
    made, real = [], samples.with_prompts
    monkeypatch.setattr(samples, "with_prompts", lambda *given: made.extend(real(*given)) or made)
    report = finetune(asked)
    assert losses(plain.output) == losses(asked.output)
    adapters = [Path(run.output) / "adapter" / "adapter.safetensors" for run in (plain, asked)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert len(report["samples"]) == 2
    for source, key in ((asked.model, "before"), (asked.output, "after")):
        model, tokenizer, *_ = load_run_or_model(source)
        for row, sample in zip(made, report["samples"], strict=True):
            said = generate_ids(model, tokenizer, row.input_ids[: row.prompt_len], Sampling(samples.SAMPLE_TOKENS))
            assert said.text[:12] == sample[key][:12] != ""
    assert all(sample["wanted"] in ("positive", "negative") for sample in report["samples"])
    page = (Path(asked.output) / "report.html").read_text()
    assert "answered before training" in page and "Review" in page
    assert "answered before training" not in (Path(plain.output) / "report.html").read_text()


def test_a_resumed_run_still_knows_what_was_answered_before(config):
    settings = config(max_steps=5, eval_split="25%", samples=1)
    with pytest.raises(InterruptedRunError):
        finetune(settings, callbacks=[Stop(3)])
    kept = json.loads((Path(settings.output) / "samples.json").read_text())["before"]
    assert finetune(settings, resume=True)["samples"][0]["before"] == kept[0]
    (Path(settings.output) / "samples.json").unlink()
    assert finetune(settings, resume=True)["samples"][0]["before"] is None
    assert "not known" in (Path(settings.output) / "report.html").read_text()


def test_rows_without_prompts_are_said(config, recorder, tiny_rows):
    texts = tiny_rows([{"text": f"the film was good and so was the story {i}"} for i in range(9)], name="texts.jsonl")
    report = finetune(config(data=str(texts), max_steps=2, eval_split="25%", samples=2), callbacks=[recorder])
    assert report["samples"] == []
    assert any("none of the held-out rows has a prompt" in text for text in recorder.notices)


def test_no_memory_for_answers_ends_no_run(config, recorder, monkeypatch):
    def full(self, model, row):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples.Samples, "_answer", full)
    report = finetune(config(max_steps=2, eval_split="25%", samples=1), callbacks=[recorder])
    assert report["steps"] == 2 and report["samples"][0]["after"] is None
    assert any("no memory for --samples" in text for text in recorder.notices)
