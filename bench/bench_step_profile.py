"""Where the time of a training step goes, by kind of work.

What is neither a matrix product nor attention is part of the price of a step: norms, rotary embeddings, casts, the
loss, the optimizer, autograd and Python. The profiler adds some of its own to each small operation, so the shares of
the smallest are upper bounds.

    OMP_NUM_THREADS=1 python bench/bench_step_profile.py     # writes bench/results/step_profile-cpu.json
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.profiler import ProfilerActivity, profile, record_function

from bench.assets import smollm2
from bench.bench_training import batch_of, ours
from bench.measure import report
from qrosa.adapters.inject import adapter_parameters
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.train.loss import model_loss

OPTIMIZER = "part: optimizer"
KINDS = {
    "quantised layers": ("qrosa::",),
    "head and loss": ("_ChunkedCrossEntropy",),
    "optimizer": (OPTIMIZER,),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_scaled_dot_product", "BmmBackward", "SoftmaxBackward"),
}
"""Ops whose whole time, that of the ops they call included, belongs to a kind."""
ELEMENTWISE = {
    "casts and copies": ("copy_", "_to_copy", "clone", "cat", "contiguous", "index_select", "fill_", "zero_"),
    "norms, rotary, activation, residual": (
        "mul", "add", "sub", "neg", "pow", "rsqrt", "mean", "sum", "silu", "div", "expand", "reciprocal", "sigmoid",
    ),
}  # fmt: skip
"""Of what is left: the names of ops after ``aten::``, by how they begin."""


def kind_of(name: str) -> str:
    """The kind of an op by its own name."""
    bare = name.removeprefix("aten::")
    for kind, starts in ELEMENTWISE.items():
        if name.startswith("aten::") and bare.removeprefix("_").startswith(starts):
            return kind
    return "autograd, Python, views, allocation"


def shares(events: Any) -> dict[str, float]:
    """Microseconds of each kind: whole subtrees for ``KINDS``, self time for the rest."""
    found: dict[str, float] = defaultdict(float)

    def walk(event: Any) -> None:
        for kind, names in KINDS.items():
            if any(name in event.name for name in names) and "evaluate_function" not in event.name:
                found[kind] += event.cpu_time_total
                return
        found[kind_of(event.name)] += event.self_cpu_time_total
        for child in event.cpu_children:
            walk(child)

    for event in events:
        if event.cpu_parent is None:
            walk(event)
    return dict(found)


def step(model: Any, batch: Any, optimizer: AdapterOptimizer) -> None:
    """One optimizer step of the engine, its optimizer marked."""
    loss, count = model_loss(model, batch)
    (loss / count).backward()
    with record_function(OPTIMIZER):
        optimizer.accumulate()
        optimizer.clip(1.0)
        optimizer.step(lr=1e-4, sparse_lr=1e-4)


def measure(rows: int, length: int, *, sparse: bool, checkpointing: bool, steps: int) -> dict[str, Any]:
    """Shares of the time of a step, in percent."""
    model, batch = ours(smollm2(), sparse=sparse, checkpointing=checkpointing), batch_of(rows, length)
    optimizer = AdapterOptimizer(*adapter_parameters(model))
    step(model, batch, optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step(model, batch, optimizer)
    parts = shares(found.events())
    total = sum(parts.values())
    work = (
        f"{rows} x {length} tokens" + (", sparse part" if sparse else "") + (", recomputing" if checkpointing else "")
    )
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return {"work": work, "step_ms": total / steps / 1e3, **{kind: 100 * value / total for kind, value in ordered}}


def main() -> None:
    """Read the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    cases = [(4, 128, False, False), (4, 128, True, False), (4, 256, True, False), (4, 128, True, True)]
    found = [measure(r, n, sparse=s, checkpointing=c, steps=steps) for r, n, s, c in cases]
    report("step_profile", found)


if __name__ == "__main__":
    main()
