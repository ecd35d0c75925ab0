"""Training and generation speed of a real model against PEFT + bitsandbytes QLoRA, on the CPU.

Same model (SmolLM2-135M), same rows, same micro-batch, length, rank, dropout and recomputation on both sides; steps
take turns, so that a slow moment of a shared machine hits both. The peer is used as its documentation shows it:
transformers loads the base in 4 bits, PEFT adds LoRA to all linear layers, transformers' own loss, torch's AdamW; it
computes in bfloat16, or in float32 where the processor is slow in 16 bits (on one with AVX2 alone 20 times slower).
qrosa runs twice: at rank 16 without a sparse part, and with one of 0.6% density. Generation is greedy, one prompt,
transformers' ``generate``. The last row is a step as a run takes it: 16 film reviews of different lengths, loss on
their completions, qrosa's micro-batches against one padded batch.

    python bench/bench_training.py                     # writes bench/results/training-cpu.json, or without AVX-512
                                                       # training-avx2-cpu.json
    python bench/bench_training.py --without-tiles     # training-without-tiles-cpu.json: as a processor without AMX
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench.assets import smollm2
from bench.demo import write_rows
from bench.measure import report
from qrosa import ops
from qrosa.adapters.inject import adapter_parameters, quantized_linears
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.load import load_base
from qrosa.base.open import open_tokenizer
from qrosa.config import AdapterConfig
from qrosa.data.batching import Limits, MicroBatch, micro_batches, supervised_tokens
from qrosa.data.dataset import load_rows
from qrosa.data.encode import EncodedRow
from qrosa.data.order import step_rows
from qrosa.eval.generate import continue_ids
from qrosa.model.modes import set_attention, set_checkpointing
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.planner.search.candidates import WANTED_TOKENS
from qrosa.processor import widens_products
from qrosa.sparse.csr import CsrDelta
from qrosa.train.loss import model_loss
from qrosa.train.step import StepRunner

WITHOUT_TILES = {"QROSA_CPU_ISA": "avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
RANK, DENSITY, DROPOUT = 16, 0.006, 0.05


def batch_of(rows: int, length: int) -> MicroBatch:
    """Random tokens, all of them supervised: the most that the loss can cost."""
    ids = torch.randint(3, 49000, (rows, length), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids, torch.ones_like(ids), ids.clone(), list(range(rows)))


def ours(folder: Path, *, sparse: bool, checkpointing: bool) -> Any:
    """The engine's model as ``qrosa finetune`` sets it up."""
    model, _ = load_base(str(folder))
    set_attention(model, "sdpa" if widens_products() else "eager")  # as the plan would
    set_checkpointing(model, checkpointing)
    attach_adapter(model, AdapterConfig(rank=RANK, density=0.0, dropout=DROPOUT))
    if sparse:
        generator = torch.Generator().manual_seed(1)
        for layer in quantized_linears(model).values():
            mask = torch.rand(layer.out_features, layer.in_features, generator=generator) < DENSITY
            layer.set_sparse(CsrDelta.from_mask(mask))
    return model.train()


def our_step(model: Any, batch: MicroBatch) -> Callable[[], object]:
    """One optimizer step of the engine."""
    optimizer = AdapterOptimizer(*adapter_parameters(model))

    def step() -> None:
        loss, count = model_loss(model, batch)
        (loss / count).backward()
        optimizer.accumulate()
        optimizer.clip(1.0)
        optimizer.step(lr=1e-4, sparse_lr=1e-4)

    return step


def peer_dtype() -> torch.dtype:
    """What the peer computes in: the quicker of the two that it offers."""
    return torch.float32 if widens_products() else torch.bfloat16


def peer(folder: Path, *, checkpointing: bool) -> Any:
    """PEFT's QLoRA on the same base."""
    import peft
    import transformers

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=peer_dtype(),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=peer_dtype()
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=DROPOUT, target_modules="all-linear")
    return peft.get_peft_model(model, config).train()


def peer_step(model: Any, batch: MicroBatch) -> Callable[[], object]:
    """One optimizer step as transformers' Trainer would take it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=peer_dtype() == torch.bfloat16):
            loss = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def reviews(folder: Path, rows: int) -> list[EncodedRow]:
    """The first step's rows of a run on film reviews."""
    with tempfile.TemporaryDirectory() as scratch:
        path, _ = write_rows(Path(scratch), 200, 10)
        encoded = load_rows([str(path)], open_tokenizer(str(folder)), seq_len=256, train_on="completion").rows
        return [encoded[number] for number in step_rows(len(encoded), rows, 0, 42)]


def our_reviews(model: Any, rows: list[EncodedRow]) -> Callable[[], object]:
    """A step over rows of different lengths, as ``qrosa finetune`` takes it."""
    optimizer = AdapterOptimizer(*adapter_parameters(model))
    limits = Limits(len(rows), WANTED_TOKENS["cpu"])
    runner = StepRunner(model, optimizer, limits=limits, pad_id=2, seed=0, device=torch.device("cpu"))
    normaliser = sum(supervised_tokens(row) for row in rows)

    def step() -> None:
        runner.gradients(rows, 0, normaliser)
        optimizer.clip(1.0)
        optimizer.step(lr=1e-4, sparse_lr=1e-4)

    return step


def generation(model: Any, tokens: int) -> Callable[[], object]:
    """Greedy generation of ``tokens`` tokens after 32: by transformers, or by the engine if the model is its own."""
    from transformers import GenerationConfig

    prompt = batch_of(1, 32).input_ids
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    model.generation_config.eos_token_id = None  # nobody ends early

    def theirs() -> object:
        with torch.no_grad():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)

    run = (lambda: continue_ids(model, prompt, config)) if quantized_linears(model) else theirs
    if run().shape[1] != prompt.shape[1] + tokens:
        raise RuntimeError("generation ended early")
    return run


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, in turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def speeds(rounds: int, rows: int, lengths: list[int], new_tokens: int) -> list[dict[str, Any]]:
    """Tokens a second of every candidate and their ratios."""
    folder, found = smollm2(), []
    for checkpointing in (False, True):
        models = {
            "peft": peer(folder, checkpointing=checkpointing),
            "low_rank": ours(folder, sparse=False, checkpointing=checkpointing),
            "sparse": ours(folder, sparse=True, checkpointing=checkpointing),
        }
        for length in lengths:
            batch = batch_of(rows, length)
            steps = {name: (peer_step if name == "peft" else our_step)(model, batch) for name, model in models.items()}
            work = f"training, {rows} x {length} tokens" + (", recomputing" if checkpointing else "")
            found.append(_row(work, measure(steps, rounds), rows * length))
        if not checkpointing:
            answers = {name: generation(model.eval(), new_tokens) for name, model in models.items()}
            found.append(_row(f"generating {new_tokens} tokens", measure(answers, rounds), new_tokens))
            chosen = reviews(folder, 16)
            (padded,) = micro_batches(chosen, max_rows=16, max_tokens=2**20, pad_id=2)
            steps = {
                name: peer_step(model.train(), padded) if name == "peft" else our_reviews(model.train(), chosen)
                for name, model in models.items()
            }
            found.append(_row("training, 16 film reviews", measure(steps, rounds), padded.tokens))
    return found


def _row(work: str, seconds: dict[str, float], tokens: int) -> dict[str, Any]:
    rates = {f"{name}_tokens_per_s": tokens / value for name, value in seconds.items()}
    return {
        "work": work,
        "peer_dtype": str(peer_dtype()).removeprefix("torch."),
        **rates,
        "low_rank_over_peft": seconds["peft"] / seconds["low_rank"],
        "sparse_over_peft": seconds["peft"] / seconds["sparse"],
        "sparse_step_over_low_rank_step": seconds["sparse"] / seconds["low_rank"],
    }


def main() -> None:
    """Read the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--lengths", default="128,256")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--without-tiles", action="store_true", help="hold every library to AVX-512 with bf16")
    arguments = parser.parse_args()
    if arguments.without_tiles and any(os.environ.get(name) != value for name, value in WITHOUT_TILES.items()):
        # Libraries read these once, when they are loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WITHOUT_TILES})
    lengths = [int(length) for length in arguments.lengths.split(",")]
    without_avx512 = ops.status()["cpu"]["isa"] in ("portable", "avx2")
    name = "training-without-tiles" if arguments.without_tiles else "training-avx2" if without_avx512 else "training"
    report(name, speeds(arguments.rounds, arguments.rows, lengths, arguments.new_tokens))


if __name__ == "__main__":
    main()
