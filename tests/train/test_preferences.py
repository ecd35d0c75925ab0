"""Preference training: TRL's loss, the gradient of the loss itself, and runs that resume to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import inject_low_rank, quantized_linears, trainable_parameters
from qrosa.base.load import load_base
from qrosa.config import make_run_config
from qrosa.data.batching import Limits
from qrosa.data.dataset import load_rows
from qrosa.data.encode import IGNORE
from qrosa.errors import InputError
from qrosa.eval.preferences import adapter_off, preference_result, sum_preferences
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.sparse.csr import CsrDelta
from qrosa.train.preferences import PreferenceRunner
from qrosa.train.run import finetune

BETA = 0.3
PAIRS = [
    {
        "prompt": f"Review {index}: the film was {word}\nSentiment:",
        "chosen": f" positive, {word}" + " and good" * (index % 3),
        "rejected": " negative" + " the worse story" * (index % 2),
    }
    for index, word in enumerate(("good", "better", "lovely", "quick", "good", "brown", "small", "fine"))
]


@pytest.fixture
def work(tiny_model_dir, tiny_rows):
    """An fp32 model with both parts, so that only the order of sums can differ; and pairs."""
    model, tokenizer = load_base(str(tiny_model_dir()), dtype=torch.float32)
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 2), dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for layer in quantized_linears(model).values():
        shape = layer.weight.shape
        positions = torch.randperm(shape[0] * shape[1], generator=generator)[:40].sort().values
        layer.set_sparse(CsrDelta.from_positions(positions, shape, torch.randn(40, generator=generator) * 0.2))
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    data = load_rows(tiny_rows(PAIRS), tokenizer, seq_len=256, pairs=True)
    return model.train(), tokenizer, data


def answer_log_probs(model: Any, row: Any) -> torch.Tensor:
    """The plain way: all logits, log-softmax, summed over the answer's tokens."""
    ids = torch.tensor([row.input_ids])
    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(row.labels[1:])
    at = (targets != IGNORE).nonzero().flatten()
    return log_probs[at].gather(1, targets[at, None]).sum()


def plain_loss(model: Any, rows: Any) -> torch.Tensor:
    total = torch.zeros(())
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        policy = answer_log_probs(model, chosen) - answer_log_probs(model, rejected)
        with torch.no_grad(), adapter_off(model):
            reference = answer_log_probs(model, chosen) - answer_log_probs(model, rejected)
        total = total - torch.nn.functional.logsigmoid(BETA * (policy - reference))
    return total / (len(rows) // 2)


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(3, 10_000), Limits(16, 60)])
def test_loss_and_gradient_are_those_of_both_answers_in_one_graph(work, limits):
    model, tokenizer, data = work
    optimizer = AdapterOptimizer(
        [p for p in trainable_parameters(model) if p.ndim == 2], [p for p in trainable_parameters(model) if p.ndim == 1]
    )
    pad, cpu = tokenizer.pad_token_id, torch.device("cpu")
    runner = PreferenceRunner(
        model, optimizer, limits=limits, pad_id=pad, seed=3, device=cpu, chunk_tokens=5, beta=BETA
    )
    ours = runner.gradients(list(data.rows), 0, data.examples) / data.examples
    expected = plain_loss(model, list(data.rows))
    assert abs(ours - math.log(2)) > 0.01, "the adapter changes too little to tell"
    assert ours == pytest.approx(float(expected.detach()), rel=1e-5)
    low_rank = [p for p in trainable_parameters(model) if p.ndim == 2]
    sparse = [p for p in trainable_parameters(model) if p.ndim == 1]
    for found, parameters in zip(optimizer.gradients(), (low_rank, sparse), strict=True):
        theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters, retain_graph=True)])
        # fp32 sums in another order: 1e-5 of the largest entry, some ten times over for two layers.
        assert (theirs - found).abs().max() < 1e-4 * theirs.abs().max()


def test_the_figures_are_trl_s(work, tiny_model_dir, tiny_rows, tmp_path):
    trl = pytest.importorskip("trl", reason="the oracle is TRL's DPOTrainer")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model, tokenizer, _ = work
    tokenizer.chat_template = None  # whose line end behind an answer TRL learns as well
    data = load_rows(tiny_rows(PAIRS), tokenizer, seq_len=256, pairs=True)
    ours = preference_result(sum_preferences(model, data.rows, beta=BETA, max_tokens=64))
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32) for _ in range(2))
    for path, layer in quantized_linears(model).items():
        policy.get_submodule(path).weight.data = layer.effective_weight().float()
        reference.get_submodule(path).weight.data = layer.weight.dequantize(torch.float32)
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=BETA, per_device_eval_batch_size=4, report_to="none", use_cpu=True,
        bf16=False, max_length=256,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
    assert ours["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])
    assert BETA * ours["margin"] == pytest.approx(theirs["eval_rewards/margins"], rel=2e-3)


def settings(model: Path, data: Path, output: Path, **more: Any) -> Any:
    values = {
        "model": str(model),
        "data": [str(data)],
        "output": str(output),
        "objective": "dpo",
        "rank": 2,
        "density": 0.01,
        "batch_size": 3,
        "max_steps": 6,
        "warmup_steps": 2,
        "mask_samples": 4,
        "lr": 5e-3,
        "sparse_lr": 1e-3,
        "save_every": 3,
        "keep": 9,
        "sparse_init": "zero",
    }
    return make_run_config({**values, **more})


def test_a_run_learns_to_prefer_and_resumes_to_the_bit(tiny_model_dir, tiny_rows, tmp_path):
    pairs = tiny_rows(PAIRS * 2, name="pairs.jsonl")
    run = settings(tiny_model_dir(), pairs, tmp_path / "run", eval_split="25%", max_steps=12, eval_every=6)
    report = finetune(run)
    assert report["loss"]["first"] == pytest.approx(math.log(2), rel=1e-3), "the start is not the reference"
    assert report["loss"]["last"] < 0.6
    assert report["eval"]["rows"] == 4 and report["eval"]["accuracy"] > 0.5 and report["eval"]["margin"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines][:4] == ["warmup", "warmup", "select", "train"]
    assert "chosen preferred" in (tmp_path / "run" / "README.md").read_text()

    for step in (6, 9, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        folder.rename(tmp_path / f"gone-{step}")
    whole = (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes()
    finetune(run, resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes() == whole


def test_pairs_stay_together(tiny_model_dir, tiny_rows):
    _, tokenizer = load_base(str(tiny_model_dir()))
    rows = [*PAIRS, {"prompt": "the film " * 60, "chosen": " good", "rejected": " bad"}]
    data = load_rows(tiny_rows(rows), tokenizer, seq_len=100, pairs=True)
    assert (data.examples, len(data.rows), data.report.dropped) == (8, 16, 1)
    rest, held = data.split(0.25, seed=1)
    assert (rest.examples, held.examples) == (6, 2)
    for part in (data, rest, held):
        for chosen, rejected in zip(part.rows[::2], part.rows[1::2], strict=True):
            assert chosen.where == rejected.where
            assert "positive" in chosen.completion_text(tokenizer) and "negative" in rejected.completion_text(tokenizer)
    assert list(rest.wanted) == list(rest.rows)[::2]


@pytest.mark.parametrize("form", ["text", "messages", "whole", "hub"])
def test_answers_in_every_form_are_the_same_rows(form, tiny_model_dir, tiny_rows):
    _, tokenizer = load_base(str(tiny_model_dir()))
    user, answers = "what is good?", ("the film", "the story")
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    row: dict[str, Any] = {"prompt": user, "chosen": answers[0], "rejected": answers[1]}
    if form == "messages":
        row = {"prompt": [turn("user", user)], **{k: [turn("assistant", row[k])] for k in ("chosen", "rejected")}}
    if form in ("whole", "hub"):
        row |= {k: [turn("user", user), turn("assistant", row[k])] for k in ("chosen", "rejected")}
    if form == "hub":  # as sets of preferences on the hub have them: more columns beside
        row |= {"messages": row["chosen"], "score_chosen": 8.0, "score_rejected": 2.0, "prompt_id": "x"}
    data = load_rows(tiny_rows([row]), tokenizer, seq_len=100, pairs=True)
    found = [(tokenizer.decode(r.input_ids), r.completion_text(tokenizer)) for r in data.rows]
    plain = load_rows(
        tiny_rows([{"prompt": user, "completion": a} for a in answers], name="plain.jsonl"), tokenizer, seq_len=100
    )
    assert found == [(tokenizer.decode(r.input_ids), r.completion_text(tokenizer)) for r in plain.rows]


def test_what_cannot_be_learnt_so_is_refused(tiny_model_dir, tiny_rows, tmp_path):
    pairs, rows = tiny_rows(PAIRS, name="pairs.jsonl"), tiny_rows()
    cases = [
        (settings(tiny_model_dir(), pairs, tmp_path / "a", dropout=0.1), "--dropout makes random"),
        (settings(tiny_model_dir(), pairs, tmp_path / "a", train_on="all"), "--train-on all adds prompts"),
        (settings(tiny_model_dir(), rows, tmp_path / "a"), "preferences are learnt from prompt, chosen and rejected"),
        (settings(tiny_model_dir(), pairs, tmp_path / "a", objective="sft"), "one answer alone is not what it says"),
    ]
    for run, words in cases:
        with pytest.raises(InputError, match=words):
            qrosa.finetune(run)
    assert not (tmp_path / "a").exists()
