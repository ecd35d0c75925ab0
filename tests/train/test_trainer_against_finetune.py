"""TRL's SFTTrainer with RosaCallback beside ``qrosa finetune``: the same settings, rows and order, the same losses."""

import json

import pytest
import torch
from safetensors.torch import load_file

import qrosa
from qrosa.adapters.inject import adapter_state
from qrosa.config import make_run_config
from qrosa.data.dataset import load_rows
from qrosa.data.order import step_rows
from qrosa.train.run import finetune
from tests.train.conftest import losses

trl = pytest.importorskip("trl", reason="of TRL's SFTTrainer")
datasets = pytest.importorskip("datasets", reason="TRL takes rows as the datasets library holds them")

STEPS, BATCH, SEED, RATES = 3, 2, 42, {"lr": 3e-4, "sparse_lr": 1e-4}
MASKS = {"mask_samples": 2, "warmup_steps": 1}
ADAPTER = {"rank": 4, "density": 0.003, "dropout": 0.0}
FILMS = ("a quiet triumph", "two hours of nothing", "warm, funny and wise", "badly cut and badly acted")


class InOrder(trl.SFTTrainer):
    """Takes the rows in the order of a run's steps."""

    def _get_train_sampler(self, *_):
        return [row for step in range(STEPS) for row in step_rows(len(self.train_dataset), BATCH, step, SEED)]


def write_rows(path, count=8):
    """Texts, which carry loss on every token: one odd token more or less does not turn a step."""
    texts = [
        f"The {('first', 'second', 'third')[index % 3]} review calls it {FILMS[index % 4]}." for index in range(count)
    ]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def masks(adapter):
    """Where sparse values are: (layer, row, column)."""
    found = set()
    for name in (name for name in adapter if name.endswith("sparse_col")):
        path = name.removesuffix("sparse_col")
        counts = adapter[f"{path}sparse_row_ptr"].diff()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        found.update((path, *place) for place in zip(rows.tolist(), adapter[name].tolist(), strict=True))
    return found


def test_sft_on_a_real_model_gives_the_losses_of_a_run(smollm2, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    run = {
        "model": str(smollm2), "data": data, "output": str(tmp_path / "run"), "max_steps": STEPS, "batch_size": BATCH,
        "micro_batch": str(BATCH), "checkpointing": "off", "lr_warmup": 0.0, "seed": SEED, **RATES, **MASKS, **ADAPTER,
    }  # fmt: skip
    finetune(make_run_config(run))

    model, tokenizer = qrosa.load(str(smollm2), qrosa.AdapterConfig(**ADAPTER), seed=SEED)
    rows = [
        {"input_ids": row.input_ids, "completion_mask": [int(label != -100) for label in row.labels]}
        for row in load_rows((data,), tokenizer, seq_len=128).rows
    ]
    trainer = InOrder(
        model=model,
        processing_class=tokenizer,
        args=trl.SFTConfig(
            str(tmp_path / "trl"), max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="linear",
            warmup_steps=0, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
            bf16=False, use_cpu=True, max_length=128, disable_tqdm=True,
            completion_only_loss=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[qrosa.RosaCallback(MASKS, seed=SEED)],
        optimizers=(qrosa.optimizer(model, **RATES), None),
    )  # fmt: skip
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    expected = list(losses(tmp_path / "run").values())
    assert expected[0] - expected[-1] > 0.5  # much was learnt, and
    assert found[0] == pytest.approx(expected[0], rel=3e-3)
    # Gradients near zero round to either sign, and a first step of Adam takes signs: a few thousandths, and more where
    # products are rounded to 16 bits.
    assert found == pytest.approx(expected, rel=0.02)
    run_masks = masks(load_file(tmp_path / "run" / "adapter" / "adapter.safetensors"))
    own_masks = masks(adapter_state(model))
    assert len(run_masks & own_masks) > 0.8 * len(run_masks) > 0
