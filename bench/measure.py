"""Timing for the op benchmarks: interleaved runs, medians, ratios of one run, and a JSON record of the machine.

Machines are shared and clocks move, so absolute times mean little. Candidates run in turns and every ratio compares
medians of the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qrosa import ops

RESULTS = Path(__file__).parent / "results"


def medians(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a slow moment hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def quantized(rows: int, columns: int, seed: int = 0) -> tuple[ops.NF4Operands, torch.Tensor, Any]:
    """A random bf16 matrix in NF4 with double quantisation: our operands, bitsandbytes' packed tensor and state."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = state.state2
    return ops.NF4Operands(packed.flatten(), state.absmax, nested.code, nested.absmax, state.offset, 64), packed, state


def delta(rows: int, columns: int, density: float, seed: int = 0) -> ops.CsrOperands:
    """A random sparse delta."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    row_ptr = torch.zeros(rows + 1, dtype=torch.int32)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.uint16 if columns <= ops.MAX_UINT16_COLUMNS else torch.int32)
    return ops.CsrOperands(row_ptr, col, torch.randn(col.numel(), generator=generator) * 0.01)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Prints the rows and writes ``results/<name>-cpu.json``: the machine, ``more``, and the rows."""
    record = {
        "benchmark": name,
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "isa": ops.status()["cpu"]["isa"],
        "path": ops.library.CPU_ISAS[torch.ops.qrosa.cpu_isa(-1)],
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}-cpu.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, target)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
