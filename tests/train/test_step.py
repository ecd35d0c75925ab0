"""Gradients of a step do not depend on the micro-batch; seeds do not collide; memory faults are told apart."""

import pytest
import torch

from qrosa.adapters.inject import inject_low_rank, quantized_linears, trainable_parameters
from qrosa.base.load import load_base
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.dataset import load_rows
from qrosa.errors import InputError, TrainingError
from qrosa.model.modes import set_checkpointing
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.train import guard
from qrosa.train.step import StepRunner, is_out_of_memory, micro_batch_seed


@pytest.fixture
def work(tiny_model_dir, tiny_rows):
    """An fp32 model with fp32 adapters, so that only the order of sums can differ; and eight rows."""
    model, tokenizer = load_base(str(tiny_model_dir()), dtype=torch.float32)
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 2), dropout=0.0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    rows = load_rows(tiny_rows(count=8), tokenizer, seq_len=256, train_on="all").rows
    for index, row in enumerate(rows):  # lengths that differ, so that there is padding
        row.input_ids, row.labels = row.input_ids[: 8 + 3 * index], row.labels[: 8 + 3 * index]
    return model.train(), tokenizer, rows


def gradient(work, limits, step=0):
    model, tokenizer, rows = work
    optimizer = AdapterOptimizer(trainable_parameters(model))
    runner = StepRunner(
        model,
        optimizer,
        limits=limits,
        pad_id=tokenizer.pad_token_id,
        seed=3,
        device=torch.device("cpu"),
        chunk_tokens=5,
    )
    normaliser = sum(supervised_tokens(row) for row in rows)
    loss = runner.gradients(rows, step, normaliser)
    return loss / normaliser, optimizer.gradients()[0]


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(3, 10_000), Limits(8, 40)])
def test_the_gradient_does_not_depend_on_the_micro_batch(work, limits):
    whole_loss, whole = gradient(work, Limits(8, 10_000))
    loss, split = gradient(work, limits)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    # fp32 sums in another order: 1e-5 of the largest entry.
    assert (split - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_gradient_is_that_of_transformers_mean_loss(work):
    model, _, rows = work
    loss, ours = gradient(work, Limits(3, 10_000))
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss * n, count + n
    parameters = trainable_parameters(model)
    theirs = torch.autograd.grad(total / count, parameters)
    assert loss == pytest.approx(float((total / count).detach()), rel=1e-5)
    assert (torch.cat([g.flatten() for g in theirs]) - ours).abs().max() < 1e-5 * ours.abs().max()


def test_dropout_is_repeated_by_step_and_changes_between_steps(work):
    for layer in quantized_linears(work[0]).values():
        layer.low_rank.dropout = 0.3
    _, first = gradient(work, Limits(3, 10_000), step=4)
    torch.rand(10)  # whatever was drawn in between
    _, again = gradient(work, Limits(3, 10_000), step=4)
    _, other = gradient(work, Limits(3, 10_000), step=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_checkpointing_gives_the_same_gradient_with_dropout_and_frozen_embeddings(work):
    for layer in quantized_linears(work[0]).values():
        layer.low_rank.dropout = 0.3
    _, kept = gradient(work, Limits(3, 10_000))
    set_checkpointing(work[0], True)
    _, recomputed = gradient(work, Limits(3, 10_000))
    assert kept.abs().max() > 0
    assert torch.equal(kept, recomputed)


def test_out_of_memory_in_the_middle_of_a_step_is_as_if_it_had_begun_smaller(work, monkeypatch):
    from qrosa.train import step as module

    _, small = gradient(work, Limits(2, 80))
    real, calls = module.model_loss, []

    def tight(model, batch, chunk_tokens):
        calls.append(batch.input_ids.shape[0])
        if len(calls) == 2:  # the first micro-batch is done, its gradients accumulated
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(model, batch, chunk_tokens)

    monkeypatch.setattr(module, "model_loss", tight)
    _, resumed = gradient(work, Limits(4, 160))
    assert torch.equal(resumed, small)


def test_other_errors_pass(work, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("qrosa.train.step.model_loss", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        gradient(work, Limits(4, 160))


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("index out of range"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, answer):
    assert is_out_of_memory(error) is answer


def test_seeds_do_not_collide():
    seeds = {micro_batch_seed(s, t, p, i) for s in range(4) for t in range(20) for p in range(3) for i in range(10)}
    assert len(seeds) == 4 * 20 * 3 * 10
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert micro_batch_seed(42, 0, 0, 0) == micro_batch_seed(42, 0, 0, 0)


def test_limits_halve_to_one():
    assert Limits(5, 1001).halved() == Limits(2, 500)
    assert Limits(1, 1).halved() == Limits(1, 1)


def test_a_part_without_gradient_is_noticed_and_a_late_one_is_not():
    watch = guard.ZeroGradientGuard()
    for _ in range(2):
        watch.see({"low_rank": 1.0, "sparse": 0.0})
    assert watch.watches(["low_rank", "sparse"])
    watch.see({"low_rank": 0.0, "sparse": 0.5})
    assert not watch.watches(["low_rank", "sparse"])
    with pytest.raises(TrainingError, match="sparse part was exactly zero"):
        other = guard.ZeroGradientGuard()
        for _ in range(3):
            other.see({"low_rank": 1.0, "sparse": 0.0})


def test_finite_and_supervised_checks():
    guard.check_finite(1.0, 2.0, 3, None)
    with pytest.raises(TrainingError, match="gradient norm is nan") as stopped:
        guard.check_finite(1.0, float("nan"), 3, None)
    assert "no checkpoint was written yet" in stopped.value.hint
    guard.check_supervised(1, 1)
    with pytest.raises(InputError, match="step 2 has no supervised token"):
        guard.check_supervised(0, 2)


def test_unchanged_parts_are_named():
    guard.check_changed({"low_rank": "a", "sparse": "b"}, {"low_rank": "c", "sparse": "d"})
    with pytest.raises(TrainingError, match="sparse part has not changed"):
        guard.check_changed({"low_rank": "a", "sparse": "b"}, {"low_rank": "c", "sparse": "b"})
