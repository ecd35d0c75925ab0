"""The ceiling: all parameters trained, in 16 bits with fp32 masters, on the same rows in the same order.

Nothing of qrosa's engine is in it but the encoding of rows, their order and the shape of the schedule, so that what a
method of qrosa is compared with does not share its faults.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.tasks import Task
from bench.assets import smollm2


def train_all(
    task: Task, folder: Path, *, lr: float, seed: int, fixed: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Train every parameter.

    Args:
        task: Gives the rows.
        folder: For the file of rows.
        lr: Highest learning rate.
        seed: Of the rows' order.
        fixed: ``batch_size``, ``epochs`` and ``chat_template`` as the other methods have them.

    Returns:
        The model in bf16, its tokenizer, and columns of the table.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qrosa.data.batching import micro_batches
    from qrosa.data.dataset import load_rows
    from qrosa.data.order import step_rows
    from qrosa.optim.schedule import learning_rate_factor, phases_of

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = Path(fixed["chat_template"]).read_text(encoding="utf-8")
    task.write("train", folder / "train.jsonl")
    rows = load_rows(str(folder / "train.jsonl"), tokenizer, seq_len=2048).rows
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16, attn_implementation="eager").train()
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0)
    batch_size = int(fixed["batch_size"])
    total = phases_of(-(-int(fixed["epochs"]) * len(rows) // batch_size), None, low_rank=False, sparse=False).total
    started, tokens = time.perf_counter(), 0
    for step in range(total):
        picked = [rows[index] for index in step_rows(len(rows), batch_size, step, seed)]
        (batch,) = micro_batches(picked, max_rows=batch_size, max_tokens=1 << 30, pad_id=0)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        tokens += int(batch.attention_mask.sum())
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, total, "linear", 0.03)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
    seconds = time.perf_counter() - started
    facts = {
        "trainable": sum(parameter.numel() for parameter in parameters),
        "steps": total,
        "train_tokens": sum(len(row.input_ids) for row in rows),
        "tokens_per_s": f"{tokens / seconds:.0f}",
        "peak_bytes": _peak(),
    }
    return model.eval(), tokenizer, facts


def _peak() -> int:
    """Most resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
