"""Without a sparse part, a run is QLoRA: the same losses as PEFT + bitsandbytes over 30 steps of a real model.

What is the same on both sides: the 4-bit base (bitsandbytes quantises for both), A and B before the first step, rows
and their order, learning rates, clipping, AdamW in fp32. The peer computes in fp32, qrosa in bf16 with matrices rounded
from fp32 masters, so the gap is bf16's noise and nothing else.

The peer is not run in bf16, because there it is not a reference: PEFT adds the low-rank product to a base output that
is rounded already, and after the first steps that product is some 0.0004 of the output, a fifth of bf16's spacing, so
most of it rounds away (measured at step 2, at twice this rate: loss 5.22, where fp32 has 4.93). qrosa's op does the
same on most machines; where it fuses the products (CPUs with AMX) it rounds the sum once and has 4.94.

bf16 carries 8 bits: logits are about 3% away from an fp32 forward pass of the same weights; averaged over the 32
supervised tokens of a step that is some 0.3% of the loss. Measured over 30 steps (losses fall from 5.6 to 0.95):
fused, 1.2% at most; not fused, 7% at step 3, below 3% from step 6 and 1.6% from step 9 on. The test allows 10% before
step 9 and 3% from there, so that it holds on any machine.
"""

import json

import pytest
import torch

from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.load import load_base
from qrosa.config import make_run_config
from qrosa.data.batching import micro_batches
from qrosa.data.dataset import load_rows
from qrosa.data.order import step_rows
from qrosa.optim.schedule import learning_rate_factor
from qrosa.train.run import finetune
from tests.train.conftest import losses

STEPS, BATCH, RANK, ALPHA, LR, CLIP, SEED = 30, 4, 4, 16.0, 1e-3, 1.0, 11


@pytest.fixture
def rows_file(tmp_path):
    """Forty short sentences of one pattern; every token carries loss, which averages the noise of single ones."""
    path = tmp_path / "rows.jsonl"
    animals = ["dog", "cat", "hen", "fox", "owl", "bee", "ant", "cow", "pig", "rat"]
    lines = [
        {"text": f"{whose} {animal} sleeps under the table."}
        for whose in ("A", "My", "Her", "The")
        for animal in animals
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start_values(folder, config):
    """A of every layer as a run of ``config`` starts with it."""
    model, _ = load_base(str(folder))
    attach_adapter(model, config.adapter, SEED)
    return {path: layer.low_rank.A.detach().float() for path, layer in quantized_linears(model).items()}


def peft_losses(folder, rows, pad_id, start):
    """The peer: its own model, adapters and loss; torch's AdamW on fp32 adapters."""
    import peft
    import transformers

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    kinds = sorted({path.rpartition(".")[2] for path in start})
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=kinds, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()  # in eval mode bitsandbytes packs the weights for its CPU inference
    for path, a in start.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.data.copy_(a)
        assert not layer.lora_B["default"].weight.any()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    found = {}
    for step in range(STEPS):
        chosen = [rows[i] for i in step_rows(len(rows), BATCH, step, SEED)]
        (batch,) = micro_batches(chosen, max_rows=BATCH, max_tokens=10**6, pad_id=pad_id)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.param_groups[0]["lr"] = LR * learning_rate_factor(step, STEPS, "linear", 0.1)
        optimizer.step()
        optimizer.zero_grad()
        found[step + 1] = float(loss.detach())
    return found


def test_thirty_steps_of_qlora_have_pefts_losses(smollm2, rows_file, tmp_path):
    config = make_run_config(
        {
            "model": str(smollm2), "data": str(rows_file), "output": str(tmp_path / "run"), "rank": RANK,
            "alpha": ALPHA, "dropout": 0.0, "sparse_share": 0.0, "batch_size": BATCH, "max_steps": STEPS, "lr": LR,
            "lr_warmup": 0.1, "max_grad_norm": CLIP, "seed": SEED, "save_every": 100,
        }
    )  # fmt: skip
    finetune(config)
    ours = losses(config.output)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = load_rows(rows_file, tokenizer, seq_len=2048).rows
    theirs = peft_losses(smollm2, rows, tokenizer.pad_token_id, start_values(smollm2, config))

    assert ours.keys() == theirs.keys()
    gaps = [abs(ours[step] - theirs[step]) / theirs[step] for step in ours]
    assert gaps[0] < 0.01  # nothing was learnt yet: the bases are the same
    assert max(gaps[:8]) < 0.1
    assert max(gaps[8:]) < 0.03
    assert theirs[STEPS] < 0.3 * theirs[1]  # something was learnt, so the agreement is not that of two idle models
