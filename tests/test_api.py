"""What Python programs call: `dir`, a run and a plan in one call, the optimizer, saving, and a frozen adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qrosa
from qrosa.errors import InputError, StorageError, TrainingError
from qrosa.optim.rates import choose_rates


@pytest.fixture
def loaded(tiny_model_dir):
    """A tiny model with a low-rank part, and its tokenizer."""
    return qrosa.load(str(tiny_model_dir()), qrosa.AdapterConfig(rank=4, density=0.01, dropout=0.0))


@pytest.fixture
def batch(loaded):
    ids = torch.tensor([loaded[1]("the film was good and the story was good too, positive").input_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_dir_is_the_api():
    assert dir(qrosa) == sorted(qrosa.__all__)
    assert {"load", "finetune", "plan", "optimizer", "RunConfig", "Callback"} <= set(dir(qrosa))
    for name in dir(qrosa):
        assert getattr(qrosa, name) is not None


def test_python_m_qrosa():
    done = subprocess.run([sys.executable, "-m", "qrosa", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qrosa {qrosa.__version__}\n"


def test_a_run_and_a_plan_in_one_call(tiny_model_dir, tiny_rows, tmp_path):
    settings = {
        "model": str(tiny_model_dir()), "data": str(tiny_rows()), "budget": "4%", "max_steps": 2, "batch_size": 2,
        "warmup_steps": 1, "mask_samples": 2,
    }  # fmt: skip
    plan = qrosa.plan(settings, seq_len=64)
    assert plan.fits and plan.work.length < 64  # the rows were measured
    steps = []

    class Counter(qrosa.Callback):
        def on_step(self, record):
            steps.append(record.step)

    report = qrosa.finetune({**settings, "output": str(tmp_path / "run")}, callbacks=[Counter()])
    assert report["steps"] == 2 and steps == [1, 2]
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    with pytest.raises(InputError, match="no model is named"):
        qrosa.plan(budget="1%")


def losses_of(model, optimizer, batch, steps, scheduler=None):
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_the_optimizer_trains_both_parts_at_their_own_rates(loaded, batch):
    model, _ = loaded
    optimizer = qrosa.optimizer(model, lr=5e-3, sparse_lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    first = losses_of(model, optimizer, batch, 4, scheduler)
    assert first[-1] < first[0]
    qrosa.select_masks(model, [batch])
    path, layer = next((p, m) for p, m in model.named_modules() if getattr(m, "nnz", 0))
    before = layer.sparse_values.detach().clone()
    losses_of(model, optimizer, batch, 2)
    assert torch.equal(layer.sparse_values, before), path  # taken in, at a rate of zero
    optimizer.param_groups[1]["lr"] = 1e-2
    losses_of(model, optimizer, batch, 1)
    assert not torch.equal(layer.sparse_values, before)
    assert optimizer.inner.groups["low_rank"].master.dtype == torch.float32


def test_the_optimizer_has_the_rates_of_a_run(tiny_model_dir):
    model, _ = qrosa.load(str(tiny_model_dir()), qrosa.AdapterConfig(rank=4, density=0.0, alpha=32.0))
    rates = choose_rates(width=64, alpha=32.0, steps=500)
    optimizer = qrosa.optimizer(model, steps=500)
    assert [group["lr"] for group in optimizer.param_groups] == [rates.low_rank, rates.sparse]
    given = qrosa.optimizer(model, lr=1e-3)
    assert [group["lr"] for group in given.param_groups] == [
        1e-3,
        choose_rates(width=64, alpha=32.0, low_rank=1e-3).sparse,
    ]


def test_the_optimizer_goes_on_bit_for_bit(tiny_model_dir, batch):
    def fresh():
        model, _ = qrosa.load(str(tiny_model_dir()), qrosa.AdapterConfig(rank=4, density=0.0, dropout=0.0))
        return model, qrosa.optimizer(model, lr=5e-3)

    model, optimizer = fresh()
    losses_of(model, optimizer, batch, 2)
    state = optimizer.state_dict()
    rest = losses_of(model, optimizer, batch, 3)
    again, restored = fresh()
    restored.load_state_dict(state)
    assert losses_of(again, restored, batch, 3) == rest


def test_what_cannot_be_optimized_is_refused(tiny_model_dir, loaded):
    with pytest.raises(InputError, match="no adapter to optimize"):
        qrosa.optimizer(qrosa.load(str(tiny_model_dir()))[0])
    model, _ = loaded
    with pytest.raises(TrainingError, match="no parameter of the adapter has a gradient"):
        qrosa.optimizer(model).step()
    with pytest.raises(InputError, match="optimizer 'sgd' is unknown"):
        qrosa.optimizer(model, kind="sgd")


def freeze_all(model):
    """What peers' helpers do to a model that they are to prepare."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()  # backward then finds something to do, and nothing is learnt


def test_a_frozen_adapter_is_noticed_at_the_first_step(loaded, batch):
    model, _ = loaded
    freeze_all(model)
    with pytest.raises(InputError, match="the adapter is frozen"):
        qrosa.optimizer(model)
    model.eval()(**batch)  # to use it is nobody's mistake
    with pytest.raises(TrainingError, match="nothing trains"):
        model.train()(**batch)


def test_pefts_helper_is_noticed(loaded, batch):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(loaded[0], use_gradient_checkpointing=False)
    with pytest.raises(TrainingError, match="nothing trains"):
        model.train()(**batch)


def test_save_pretrained_writes_the_adapter_or_refuses(tiny_model_dir, loaded, batch, tmp_path):
    model, _ = loaded
    optimizer = qrosa.optimizer(model, lr=5e-3)
    losses_of(model, optimizer, batch, 2)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    again, _ = qrosa.load(str(tiny_model_dir()))
    with pytest.raises(InputError, match="a 4-bit base has no weights"):
        again.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    qrosa.load_adapter(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    again.save_pretrained(tmp_path / "twice")
    same = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("saved", "twice")]
    assert same[0] == same[1]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_byte_of_an_adapter_matters(loaded, tmp_path):
    """Sampled over both files, wherever it is: tensors' values, header, rank, alpha, fingerprint."""
    model, _ = loaded
    for name in ("adapter.safetensors", "adapter_config.json"):
        qrosa.save_adapter(model, tmp_path)
        size = (tmp_path / name).stat().st_size
        for at in range(0, size, size // 23):
            qrosa.save_adapter(model, tmp_path)
            if (tmp_path / name).read_bytes()[at : at + 1].isspace() and name.endswith(".json"):
                continue
            flip(tmp_path / name, at)
            with pytest.raises((StorageError, InputError)):
                qrosa.load_adapter(model, tmp_path)
