"""Training steps of 8B and 12B models under 24 GB: PEFT + bitsandbytes QLoRA, qrosa without and with its sparse part.

    python -m bench.compare_qlora --model llama-3.1-8b --system qrosa-sparse    # one system, prints one JSON line

Weights are random, made on the card matrix by matrix: neither speed nor memory depends on them. All systems see the
same rows (sequences of 2048 tokens, every one supervised), recompute activations, drop out 5% and train 0.3% of the
base's parameters: (a) all of it low-rank on every linear layer, through PEFT, transformers' loss and AdamW, as QLoRA's
documentation shows it; (b) the same in qrosa; (c) qrosa with half of it in the sparse part. Each runs in a process of
its own, deterministic and with the allocator capped at 24 GB, whatever the card has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.gpu_measure import Measurement, require_card
from bench.random_checkpoint import SHAPES

CAP = 24 * 10**9
BUDGET, DROPOUT, SEQUENCE, STEPS, WARMUP = 0.003, 0.05, 2048, 8, 2
SYSTEMS = ("peft", "qrosa", "qrosa-sparse")
MODELS = ("llama-3.1-8b", "mistral-nemo-12b")


def config_of(name: str) -> Any:
    """The transformers config of a model's shape."""
    from transformers import AutoConfig

    settings = dict(SHAPES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._attn_implementation = "sdpa"
    return config


def random_weight(rows: int, columns: int) -> torch.Tensor:
    """What an initialised layer holds, bf16 on the card."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(0.02)


def fill_dense(model: nn.Module) -> None:
    """Gives every parameter that is still on the meta device a place on the card: matrices random, norms one."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        value = random_weight(*parameter.shape) if parameter.dim() == 2 else torch.ones_like(parameter, device="cuda")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value.to(torch.bfloat16), requires_grad=False))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("cuda")


def ours(name: str, *, sparse: bool) -> tuple[Any, Callable[[Any], None], int]:
    """qrosa's model, its step, and how much of it trains."""
    from qrosa.adapters.budget import allocate
    from qrosa.adapters.inject import (
        adapter_parameters,
        inject_low_rank,
        linear_shapes,
        quantized_linears,
        trainable_parameters,
    )
    from qrosa.base.build import empty_model
    from qrosa.base.load import count_parameters
    from qrosa.config import AdapterConfig
    from qrosa.model.modes import set_checkpointing
    from qrosa.optim.adamw import AdapterOptimizer
    from qrosa.quant.nf4 import NF4Weight
    from qrosa.train.loss import model_loss

    model = empty_model(config_of(name))
    for layer in quantized_linears(model).values():
        layer.weight = NF4Weight.quantize(random_weight(*layer.weight.shape), torch.bfloat16)
        layer.device = torch.device("cuda")
    fill_dense(model)
    set_checkpointing(model, True)
    config = AdapterConfig(budget=f"{BUDGET:.4%}", sparse_share=0.5 if sparse else 0.0, dropout=DROPOUT)
    allocation = allocate(config, linear_shapes(model), count_parameters(model))
    inject_low_rank(model, allocation.ranks, config.alpha, DROPOUT)
    layers = quantized_linears(model)
    if sparse:
        set_random_masks(layers, allocation.nnz)
    optimizer = AdapterOptimizer(*adapter_parameters(model))

    def step(batch: Any) -> None:
        loss, count = model_loss(model, batch)
        (loss / count).backward()
        optimizer.accumulate()
        optimizer.clip(1.0)
        optimizer.step(lr=1e-4, sparse_lr=1e-4)

    return model, step, sum(p.numel() for p in trainable_parameters(model))


def set_random_masks(layers: dict[str, Any], counts: dict[str, int]) -> None:
    """A sparse part of the allotted size in each layer; where its positions lie does not change the cost much."""
    from qrosa.masks.random_masks import random_positions
    from qrosa.sparse.csr import CsrDelta

    sizes = {path: layer.out_features * layer.in_features for path, layer in layers.items()}
    for path, positions in random_positions(sizes, counts, "matrix", 0).items():
        layers[path].set_sparse(CsrDelta.from_positions(positions.to("cuda"), layers[path].weight.shape))


def peer(name: str) -> tuple[Any, Callable[[Any], None], int]:
    """PEFT's QLoRA on bitsandbytes' 4-bit layers, with the rank that comes closest to the same budget."""
    import bitsandbytes as bnb
    import peft
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in path}
    total = sum(p.numel() for p in model.parameters())
    for path, linear in linears.items():
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        weight = random_weight(linear.out_features, linear.in_features)
        packed.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, packed.to("cuda"))
    fill_dense(model)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    cost = sum(linear.in_features + linear.out_features for linear in linears.values())
    rank = max(1, round(BUDGET * total / cost))
    targets = sorted({path.rpartition(".")[2] for path in linears})
    adapter = peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=DROPOUT, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(batch: Any) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step, sum(p.numel() for p in trained)


def measure(name: str, system: str, rows: int) -> dict[str, Any]:
    """Tokens/s and peak memory of one system at ``rows`` sequences a step, set up as a run of qrosa sets itself up."""
    from qrosa.model.card import held_to, with_index
    from qrosa.ops.determinism import deterministic
    from qrosa.planner.hardware import ask_for_expandable_segments

    ask_for_expandable_segments()
    with deterministic(), held_to(with_index("cuda"), CAP, 0):
        build = peer if system == "peft" else lambda model: ours(model, sparse=system == "qrosa-sparse")
        model, step, trainable = build(name)
        times = timed_steps(model, step, rows)
    return {
        "model": name,
        "system": system,
        "rows": rows,
        "trainable": trainable,
        "tokens_per_s": rows * SEQUENCE / statistics.median(times),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def timed_steps(model: Any, step: Callable[[Any], None], rows: int) -> list[float]:
    """Seconds of each step, after those that settle allocator and caches."""
    from qrosa.data.batching import MicroBatch

    model.train()
    ids = torch.randint(0, model.config.vocab_size, (rows, SEQUENCE), device="cuda")
    batch = MicroBatch(ids, torch.ones_like(ids), ids.clone(), list(range(rows)))
    times = []
    for index in range(WARMUP + STEPS):
        if index == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[WARMUP:]


def in_its_own_process(name: str, system: str, rows: int) -> dict[str, Any]:
    """One measurement, or why there is none."""
    arguments = ["--model", name, "--system", system, "--rows", str(rows)]
    command = [sys.executable, "-m", "bench.compare_qlora", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return json.loads(result.stdout)  # type: ignore[no-any-return]
    return {"model": name, "system": system, "rows": rows, "failed": (result.stderr.strip().splitlines() or ["?"])[-1]}


def compare(name: str) -> Iterator[Measurement]:
    """All systems at one and two rows a step, with the ratios that are promised."""
    for count in (1, 2):
        speeds: dict[str, float] = {}
        for system in SYSTEMS:
            case = {"model": name, "system": system, "rows": count}
            yield case, partial(_rows, name, system, count, speeds)


def _rows(name: str, system: str, count: int, speeds: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The row of a system; its speed is kept in ``speeds``, for those that come after."""
    row = in_its_own_process(name, system, count)
    speed = row.get("tokens_per_s")
    if speed:
        speeds[system] = speed
        ratios = {"over_peft": "peft", "over_qrosa": "qrosa"}
        row |= {key: speed / speeds[other] for key, other in ratios.items() if other in speeds}
    yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--rows", type=int, default=1)
    chosen = parser.parse_args()
    require_card()
    from qrosa.cli.answers import answers, stdout_for_answers

    with stdout_for_answers():
        print(json.dumps(measure(chosen.model, chosen.system, chosen.rows)), file=answers())
