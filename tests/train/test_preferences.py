"""Training on answers that are compared: TRL's losses, the gradient of the loss, and runs that resume to the bit."""

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
from qrosa.config import TrainConfig, make_run_config
from qrosa.data.batching import Limits
from qrosa.data.dataset import load_rows
from qrosa.data.encode import IGNORE
from qrosa.errors import InputError
from qrosa.eval.objectives import OBJECTIVES
from qrosa.eval.preferences import adapter_off, mismatched, preference_result, sum_preferences
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.sparse.csr import CsrDelta
from qrosa.train.preferences import PreferenceRunner
from qrosa.train.run import finetune

BETA = 0.3
WEIGHTS = {"beta": BETA, "desirable_weight": 1.2, "undesirable_weight": 0.7}
PAIRS = [
    {
        "prompt": f"Review {index}: the film was {word}\nSentiment:",
        "chosen": f" positive, {word}" + " and good" * (index % 3),
        "rejected": " negative" + " the worse story" * (index % 2),
    }
    for index, word in enumerate(("good", "better", "lovely", "quick", "good", "brown", "small", "fine"))
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["rejected" if index % 3 else "chosen"], "label": index % 3 == 0}
    for index, pair in enumerate(PAIRS)
] + [{"prompt": "the film " * 20, "completion": " and the story was good", "label": True}]  # longer than any mismatch
ROWS = {"dpo": PAIRS, "orpo": PAIRS, "kto": JUDGED}


@pytest.fixture
def work(tiny_model_dir):
    """An fp32 model with both parts, so that only the order of sums can differ."""
    model, tokenizer = load_base(str(tiny_model_dir()), dtype=torch.float32)
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 2), dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for layer in quantized_linears(model).values():
        shape = layer.weight.shape
        positions = torch.randperm(shape[0] * shape[1], generator=generator)[:40].sort().values
        layer.set_sparse(CsrDelta.from_positions(positions, shape, torch.randn(40, generator=generator) * 0.2))
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.train(), tokenizer


def answer_log_probs(model: Any, row: Any) -> torch.Tensor:
    """The plain way: all logits, log-softmax, summed over the answer's tokens."""
    ids = torch.tensor([row.input_ids])
    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(row.labels[1:])
    at = (targets != IGNORE).nonzero().flatten()
    return log_probs[at].gather(1, targets[at, None]).sum()


def plain_loss(objective: str, model: Any, rows: Any) -> torch.Tensor:
    """The papers' formulas, all answers in one graph."""

    def gained(row: Any) -> torch.Tensor:
        with torch.no_grad(), adapter_off(model):
            base = answer_log_probs(model, row)
        return answer_log_probs(model, row) - base

    def odds(row: Any) -> torch.Tensor:
        mean = answer_log_probs(model, row) / row.supervised_tokens
        return mean, (mean.exp() / (1 - mean.exp())).log()

    total = torch.zeros(())
    if objective == "kto":
        with torch.no_grad():
            drift = max(0.0, float(torch.stack([gained(row) for row in mismatched(rows)]).mean()))
        for row in rows:
            sign = 1 if row.wanted else -1
            weight = WEIGHTS["desirable_weight" if row.wanted else "undesirable_weight"]
            total = total + weight * (1 - torch.sigmoid(sign * BETA * (gained(row) - drift)))
        return total / len(rows)
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        if objective == "dpo":
            total = total - torch.nn.functional.logsigmoid(BETA * (gained(chosen) - gained(rejected)))
        else:
            (mean, ours), (_, theirs) = odds(chosen), odds(rejected)
            total = total - mean - BETA * torch.nn.functional.logsigmoid(ours - theirs)
    return total / (len(rows) // 2)


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(3, 10_000), Limits(16, 60)])
@pytest.mark.parametrize("objective", list(ROWS))
def test_loss_and_gradient_are_those_of_all_answers_in_one_graph(work, tiny_rows, objective, limits):
    model, tokenizer = work
    goal = OBJECTIVES[objective]
    data = load_rows(tiny_rows(ROWS[objective]), tokenizer, seq_len=256, answers=goal.answers)
    optimizer = AdapterOptimizer(
        [p for p in trainable_parameters(model) if p.ndim == 2], [p for p in trainable_parameters(model) if p.ndim == 1]
    )
    pad, cpu = tokenizer.pad_token_id, torch.device("cpu")
    runner = PreferenceRunner(
        model,
        optimizer,
        limits=limits,
        pad_id=pad,
        seed=3,
        device=cpu,
        chunk_tokens=5,
        objective=goal,
        weights=TrainConfig(objective=objective, **WEIGHTS),
    )
    ours = runner.gradients(list(data.rows), 0, data.examples) / data.examples
    expected = plain_loss(objective, model, list(data.rows))
    assert ours == pytest.approx(float(expected.detach()), rel=1e-5)
    low_rank = [p for p in trainable_parameters(model) if p.ndim == 2]
    sparse = [p for p in trainable_parameters(model) if p.ndim == 1]
    for found, parameters in zip(optimizer.gradients(), (low_rank, sparse), strict=True):
        theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters, retain_graph=True)])
        # fp32 sums in another order: 1e-5 of the largest entry, some ten times over for two layers.
        assert (theirs - found).abs().max() < 1e-4 * theirs.abs().max()


def figures(objective: str, model: Any, tokenizer: Any, rows: Path) -> Any:
    goal = OBJECTIVES[objective]
    data = load_rows(rows, tokenizer, seq_len=256, answers=goal.answers)
    sums = sum_preferences(model, data.rows, goal, TrainConfig(objective=objective, **WEIGHTS), max_tokens=64)
    return preference_result(sums, goal)


@pytest.fixture
def trl_eval(work, tiny_model_dir, tmp_path):
    """TRL's evaluation by one of its trainers, of the same two models as plain transformers models."""
    trl = pytest.importorskip("trl", reason="the oracles are TRL's trainers")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model, tokenizer = work
    tokenizer.chat_template = None  # whose line end behind an answer TRL learns as well
    tokenizer.bos_token = None  # which ORPOTrainer would put before each prompt

    def run(kind: str, rows: Any, **more: Any) -> dict[str, float]:
        pair = [AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32) for _ in range(2)]
        for path, layer in quantized_linears(model).items():
            pair[0].get_submodule(path).weight.data = layer.effective_weight().float()
            pair[1].get_submodule(path).weight.data = layer.weight.dequantize(torch.float32)
        if kind == "ORPO":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        else:
            Config, Trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
        made = Config(
            output_dir=str(tmp_path / "trl"), beta=BETA, report_to="none", use_cpu=True, bf16=False, max_length=256,
            **more,
        )  # fmt: skip
        reference = {} if kind == "ORPO" else {"ref_model": pair[1]}
        data = Dataset.from_list(rows)
        trainer = Trainer(
            model=pair[0], args=made, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **reference
        )
        return trainer.evaluate()

    return run


def test_dpo_is_trl_s(work, trl_eval, tiny_rows):
    ours = figures("dpo", *work, tiny_rows(PAIRS))
    theirs = trl_eval("DPO", PAIRS, per_device_eval_batch_size=4)
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
    assert ours["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])
    assert BETA * ours["margin"] == pytest.approx(theirs["eval_rewards/margins"], rel=2e-3)


def test_orpo_is_trl_s(work, trl_eval, tiny_rows):
    """TRL learns prompts as well, so they are of one token here, which nothing predicts; and it means over tokens of a
    batch, so a batch is a pair."""
    pairs = [{**pair, "prompt": "a"} for pair in PAIRS]
    ours = figures("orpo", *work, tiny_rows(pairs))
    theirs = trl_eval("ORPO", pairs, per_device_eval_batch_size=1)
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert ours["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])
    assert ours["margin"] == pytest.approx(theirs["eval_log_odds_chosen"], rel=1e-3)


def test_kto_is_trl_s(work, trl_eval, tiny_rows):
    ours = figures("kto", *work, tiny_rows(JUDGED))
    theirs = trl_eval(
        "KTO",
        JUDGED,
        per_device_train_batch_size=len(JUDGED),
        per_device_eval_batch_size=len(JUDGED),
        desirable_weight=WEIGHTS["desirable_weight"],
        undesirable_weight=WEIGHTS["undesirable_weight"],
    )
    assert ours["drift"] == pytest.approx(theirs["eval_kl"], rel=1e-3)
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)


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


@pytest.mark.parametrize("objective", list(ROWS))
def test_a_run_learns_to_prefer_and_resumes_to_the_bit(tiny_model_dir, tiny_rows, tmp_path, objective):
    data = tiny_rows((ROWS[objective] * 2)[:16], name="answers.jsonl")
    run = settings(
        tiny_model_dir(), data, tmp_path / "run", objective=objective, eval_split="25%", max_steps=12, eval_every=6
    )
    report = finetune(run)
    first = {"dpo": math.log(2), "kto": 0.5}
    if objective in first:
        assert report["loss"]["first"] == pytest.approx(first[objective], rel=1e-3), "the start is not the reference"
    assert report["loss"]["last"] < 0.95 * report["loss"]["first"]
    assert report["eval"]["rows"] == 4 and report["eval"]["accuracy"] > 0.5 and report["eval"]["margin"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines][:4] == ["warmup", "warmup", "select", "train"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{report['eval']['accuracy']:.1%}" in card and f": {objective}, beta 0.1 |" in card

    for step in (6, 9, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        folder.rename(tmp_path / f"gone-{step}")
    whole = (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes()
    finetune(run, resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes() == whole


def test_pairs_stay_together(tiny_model_dir, tiny_rows):
    _, tokenizer = load_base(str(tiny_model_dir()))
    rows = [*PAIRS, {"prompt": "the film " * 60, "chosen": " good", "rejected": " bad"}]
    data = load_rows(tiny_rows(rows), tokenizer, seq_len=100, answers="pairs")
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
    data = load_rows(tiny_rows([row]), tokenizer, seq_len=100, answers="pairs")
    found = [(tokenizer.decode(r.input_ids), r.completion_text(tokenizer)) for r in data.rows]
    plain = load_rows(
        tiny_rows([{"prompt": user, "completion": a} for a in answers], name="plain.jsonl"), tokenizer, seq_len=100
    )
    assert found == [(tokenizer.decode(r.input_ids), r.completion_text(tokenizer)) for r in plain.rows]


def test_what_is_compared_is_the_last_answer_alone(tiny_model_dir, tiny_rows):
    """Earlier answers, in a history or where both conversations begin alike, are context for both."""
    _, tokenizer = load_base(str(tiny_model_dir()))
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    before = [turn("user", "what?"), turn("assistant", "the story"), turn("user", "and?")]
    rows = [
        {"prompt": "and?", "chosen": "good", "rejected": "bad", "history": [["what?", "the story"]]},
        {"prompt": "x", **{k: [*before, turn("assistant", a)] for k, a in (("chosen", "good"), ("rejected", "bad"))}},
    ]
    data = load_rows(tiny_rows(rows), tokenizer, seq_len=100, answers="pairs")
    learnt = [tokenizer.decode([token for token in row.labels if token != IGNORE]) for row in data.rows]
    assert learnt == ["good<|im_end|>", "bad<|im_end|>"] * 2
    assert data.rows[0].input_ids == data.rows[2].input_ids


def test_labels_go_with_their_rows(tiny_model_dir, tiny_rows):
    _, tokenizer = load_base(str(tiny_model_dir()))
    labels = [True, False, "true", "False", 1, 0]
    rows = [{"prompt": f"film {index}", "completion": "good", "label": label} for index, label in enumerate(labels)]
    data = load_rows(tiny_rows(rows), tokenizer, seq_len=100, answers="judged")
    assert [row.wanted for row in data.rows] == [True, False] * 3
    assert list(data.wanted) == list(data.rows)[::2] and data.report.unwanted == 3
    flipped = load_rows(tiny_rows([{**row, "label": True} for row in rows]), tokenizer, seq_len=100, answers="judged")
    assert data.fingerprint() != flipped.fingerprint()
    assert {part.examples for part in data.split(0.5, seed=1)} == {3}


def test_mismatched_answers_take_nothing_longer(tiny_model_dir, tiny_rows):
    _, tokenizer = load_base(str(tiny_model_dir()))
    rows = load_rows(tiny_rows(JUDGED[:3]), tokenizer, seq_len=256, answers="judged").rows
    found = mismatched(rows)
    assert [row.completion_text(tokenizer) for row in rows][-1] in tokenizer.decode(found[0].input_ids)
    prompts = [row.prompt_ids() for row in rows]
    assert [row.input_ids[: len(ids)] for row, ids in zip(found, prompts, strict=True)] == prompts
    assert max(len(row.input_ids) for row in found) <= max(len(row.input_ids) for row in rows)
    assert mismatched(rows[:1]) == []


def test_what_cannot_be_learnt_so_is_refused(tiny_model_dir, tiny_rows, tmp_path):
    pairs, rows, judged = tiny_rows(PAIRS, name="pairs.jsonl"), tiny_rows(), tiny_rows(JUDGED, name="judged.jsonl")
    wanted = tiny_rows([row for row in JUDGED if row["label"]][:3], name="wanted.jsonl")
    odd = tiny_rows([{**JUDGED[0], "label": "yes"}], name="odd.jsonl")
    cases = [
        (settings(tiny_model_dir(), pairs, tmp_path / "a", dropout=0.1), "--dropout makes random"),
        (settings(tiny_model_dir(), pairs, tmp_path / "a", train_on="all"), "--train-on all adds prompts"),
        (settings(tiny_model_dir(), rows, tmp_path / "a"), "preferences are learnt from prompt, chosen and rejected"),
        (settings(tiny_model_dir(), pairs, tmp_path / "a", objective="kto"), "kto learns from prompt, completion and"),
        (
            settings(tiny_model_dir(), judged, tmp_path / "a", objective="kto", batch_size=1),
            "with another, and --batch-s",
        ),
        (settings(tiny_model_dir(), wanted, tmp_path / "a", objective="kto"), "the label of all 3 rows is true"),
        (settings(tiny_model_dir(), odd, tmp_path / "a", objective="kto"), "'label' is 'yes', and says neither"),
        (settings(tiny_model_dir(), judged, tmp_path / "a", objective="sft"), "unwanted ones would be learnt"),
        (settings(tiny_model_dir(), judged, tmp_path / "a", objective="kto", dropout=0.1), "--dropout makes random"),
        (settings(tiny_model_dir(), pairs, tmp_path / "a", objective="sft"), "one answer alone is not what it says"),
    ]
    for run, words in cases:
        with pytest.raises(InputError, match=words):
            qrosa.finetune(run)
    assert not (tmp_path / "a").exists()
