"""A training step over packed rows against the same step over padded ones: real rows of a real model, on the CPU.

Both take turns on one model, SmolLM2-135M with a budget of 0.3%, each with the micro-batches that ``qrosa finetune``
would make. *Reviews* are 16 film reviews, *texts* 8 rows of one to six of them joined, *even* 8 rows cut to one length,
so that nothing is padded and what packing costs is left. Times are processor seconds of one thread, which other
programs on the machine change least.

    python bench/bench_packing.py                      # writes bench/results/packing-cpu.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench.assets import movie_reviews, smollm2
from bench.demo import write_rows
from bench.measure import report
from qrosa.adapters.inject import adapter_parameters
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.load import load_base
from qrosa.base.open import open_tokenizer
from qrosa.config import AdapterConfig
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.dataset import load_rows
from qrosa.data.encode import EncodedRow
from qrosa.data.order import padded_share, step_rows
from qrosa.model.modes import set_attention
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.planner.search.candidates import EAGER_TOKENS, WANTED_TOKENS
from qrosa.processor import widens_products
from qrosa.train.step import StepRunner

EVEN = 64  # tokens


def reviews(folder: Path, count: int = 16) -> list[EncodedRow]:
    """The rows of a run's first step on film reviews."""
    with tempfile.TemporaryDirectory() as scratch:
        path, _ = write_rows(Path(scratch), 200, 10)
        encoded = load_rows([str(path)], open_tokenizer(str(folder)), seq_len=256, train_on="completion").rows
        return [encoded[number] for number in step_rows(len(encoded), count, 0, 42)]


def texts(folder: Path, count: int, most: int, least: int = 1) -> list[EncodedRow]:
    """Rows of ``least`` to ``most`` joined reviews, loss on all tokens."""
    draw, tokenizer = random.Random(0), open_tokenizer(str(folder))
    found = [text for text, _ in movie_reviews("rotten_tomatoes")]
    joined = [" ".join(draw.sample(found, draw.randint(least, most))) for _ in range(count)]
    ids = [tokenizer(text)["input_ids"] for text in joined]
    return [EncodedRow(row, list(row)) for row in ids]


def model_of(folder: Path) -> Any:
    """The model as a run has it."""
    model, _ = load_base(str(folder))
    attach_adapter(model, AdapterConfig(budget="0.3%", sparse_share=0.0))
    return model.train()


def step_of(model: Any, rows: list[EncodedRow], kind: str, packed: bool) -> Callable[[], object]:
    """One optimizer step."""
    optimizer = AdapterOptimizer(*adapter_parameters(model))
    limits, device = Limits(len(rows), WANTED_TOKENS["cpu"]), torch.device("cpu")
    runner = StepRunner(model, optimizer, limits=limits, pad_id=2, seed=0, device=device, packed=packed)
    normaliser = sum(supervised_tokens(row) for row in rows)

    def step() -> None:
        set_attention(model, kind, by_row=packed)
        runner.gradients(rows, 0, normaliser)
        optimizer.clip(1.0)
        optimizer.step(lr=1e-5, sparse_lr=1e-5)

    return step


def measured(name: str, rows: list[EncodedRow], model: Any, rounds: int) -> dict[str, Any]:
    """Both steps over some rows."""
    lengths = [len(row.input_ids) for row in rows]
    kind = "eager" if max(lengths) <= EAGER_TOKENS and not widens_products() else "sdpa"  # as the plan would
    steps = {way: step_of(model, rows, kind, way == "packed") for way in ("padded", "packed")}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(rounds + 1):  # the first is not counted
        for way, step in steps.items():
            begun = time.process_time()
            step()
            times[way] += [time.process_time() - begun] if turn else []
    seconds = {way: statistics.median(taken) for way, taken in times.items()}
    return {
        "rows": name,
        "count": len(rows),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "padding": padded_share([lengths], max_rows=len(rows), max_tokens=WANTED_TOKENS["cpu"]),
        "padded_seconds": seconds["padded"],
        "packed_seconds": seconds["packed"],
        "padded_over_packed": seconds["padded"] / seconds["packed"],
    }


def main() -> None:
    """Read the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    folder, found = smollm2(), []
    long = texts(folder, 8, 6)
    kinds = {"reviews": reviews(folder), "texts": long, "even": [_cut(row) for row in texts(folder, 8, 9, least=4)]}
    model = model_of(folder)
    for name, rows in kinds.items():
        found.append(measured(name, rows, model, rounds))
        print(found[-1], flush=True)
    report("packing", found)


def _cut(row: EncodedRow) -> EncodedRow:
    return EncodedRow(row.input_ids[:EVEN], row.labels[:EVEN])


if __name__ == "__main__":
    main()
