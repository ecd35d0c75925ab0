"""How true the plan is: closed form against simulation, over models, lengths, checkpointing and offload levers.

    python bench/bench_plan.py                       # the whole grid, some 15 minutes on one core
    python bench/bench_plan.py --models Mistral-7B --lengths 512,2048

Writes bench/results/plan.json, plan.md (the worst cases first) and plan.svg (planned over simulated bytes). Both count
tensors alone: no CUDA context, no allocator. Every simulation builds the real model class from its config.json values
and runs mask selection, a training step and an evaluation on tensors without data; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.real_models import MODELS
from qrosa.adapters.budget import allocate
from qrosa.base.shape import from_config
from qrosa.config import AdapterConfig
from qrosa.planner.bytes.phases import phases
from qrosa.planner.workload import Workload

LENGTHS = (512, 2048, 8192)
LEVERS: dict[str, dict[str, Any]] = {
    "none": {"checkpointing": False},
    "recompute": {"checkpointing": True},
    "recompute, offload activations": {"checkpointing": True, "offload_activations": True},
    "recompute, stream base": {"checkpointing": True, "resident_blocks": 4},
    "recompute, 4 padded rows": {"checkpointing": True, "rows": 4},
}
PHASES = ("select", "train", "eval")
COLOURS = {"select": "#d95f02", "train": "#1b9e77", "eval": "#7570b3"}
ALLOWED = (-1.0, 2.0)  # per cent


def main() -> None:
    """Run what of the grid is asked for, print it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models.split(","):
        for length in map(int, arguments.lengths.split(",")):
            for lever in LEVERS:
                for row in compare(name, length, lever):
                    rows.append(row)
                    print(line(row), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write(arguments.output / "plan.json", json.dumps(rows, indent=1) + "\n")
    write(arguments.output / "plan.md", table(rows))
    write(arguments.output / "plan.svg", plot(rows))


def workload(name: str, length: int, *, checkpointing: bool, rows: int = 1, **changes: Any) -> Workload:
    """A run of one of the models at 0.3%, micro-batches of ``rows`` longest rows."""
    shape = from_config(name, MODELS[name].config)
    settings: dict[str, Any] = {
        "shape": shape,
        "allocation": allocate(AdapterConfig(budget="0.3%"), shape.linears, shape.base_parameters),
        "device": "cuda",
        "attention": "eager" if shape.dims.attention_softcap else "sdpa",
        "optimizer": "adamw",
        "dropout": 0.05,
        "mask_score": "squared",
        "mask_scope": "matrix",
        "length": length,
        "rows": rows,
        "tokens": rows * length,
        "eval_tokens": max(4096, length),
        "checkpointing": checkpointing,
        "loss_chunk_tokens": 256,
        "mask_group_bytes": 2**31,
        "checkpoints": 2,
    }
    return Workload(**(settings | changes))


def model_config(name: str) -> Any:
    """The model's transformers config."""
    from transformers import AutoConfig

    values = {key: value for key, value in MODELS[name].config.items() if key not in ("model_type", "torch_dtype")}
    return AutoConfig.for_model(MODELS[name].config["model_type"], **values)


def compare(name: str, length: int, lever: str) -> Iterator[dict[str, Any]]:
    """Planned and simulated bytes of each phase."""
    from qrosa.measure.simulate import simulate_model

    work = workload(name, length, **LEVERS[lever])
    started = time.perf_counter()
    simulation = simulate_model(model_config(name), work)
    seconds = round(time.perf_counter() - started, 1)
    planned = phases(work)
    for phase, peak in simulation.phases.items():
        bytes_planned = planned[phase].tensor_total
        yield {
            "model": name,
            "length": length,
            "levers": lever,
            "phase": phase,
            "planned": bytes_planned,
            "simulated": peak.total,
            "percent": round(100 * (bytes_planned / peak.total - 1), 3),
            "planned_moment": planned[phase].moment,
            "simulated_moment": peak.moment,
            "seconds": seconds,
        }


def line(row: dict[str, Any]) -> str:
    """One comparison, for people."""
    where = f"{row['model']:17} {row['length']:5} {row['levers']:31} {row['phase']:7}"
    sizes = f"planned {row['planned'] / 2**20:9,.1f} simulated {row['simulated'] / 2**20:9,.1f} MiB"
    return f"{where} {sizes} {row['percent']:+7.2f}%  {row['simulated_moment']}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the span of the differences by model and phase, then the cases that are furthest off."""
    low, high = ALLOWED
    outside = sum(not low <= row["percent"] <= high for row in rows)
    text = ["# Planned against simulated bytes of tensors", ""]
    text += [
        f"{len(rows)} comparisons, {outside} outside {low:+g}% to {high:+g}%. Reproduce: `python bench/bench_plan.py`"
    ]
    text += ["", "| model | " + " | ".join(PHASES) + " |", "|---" * (1 + len(PHASES)) + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        spans = []
        for phase in PHASES:
            found = [row["percent"] for row in rows if (row["model"], row["phase"]) == (name, phase)]
            spans.append(f"{min(found):+.2f}% to {max(found):+.2f}%" if found else "")
        text.append(f"| {name} | " + " | ".join(spans) + " |")
    text += [
        "",
        "| furthest off | length | levers | phase | planned MB | simulated MB | difference |",
        "|---" * 7 + "|",
    ]
    for row in sorted(rows, key=lambda row: -abs(row["percent"]))[:15]:
        sizes = f"{row['planned'] / 2**20:,.1f} | {row['simulated'] / 2**20:,.1f} | {row['percent']:+.2f}%"
        text.append(f"| {row['model']} | {row['length']} | {row['levers']} | {row['phase']} | {sizes} |")
    return "\n".join(text) + "\n"


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: each comparison a dot, simulated GB across on a log scale, difference in per cent upwards."""
    width, height, left, bottom = 760, 360, 60, 40
    sizes = [row["simulated"] / 2**30 for row in rows]
    first, last = min(sizes) * 0.9, max(sizes) * 1.1
    top = max(2.5, *(abs(row["percent"]) for row in rows))

    def across(size: float) -> float:
        from math import log

        return left + (width - left - 20) * log(size / first) / log(last / first)

    def upwards(percent: float) -> float:
        return 20 + (height - bottom - 20) * (top - percent) / (2 * top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{upwards(2):.1f}" width="{width - left - 20}" height="{upwards(-1) - upwards(2):.1f}" '
        'fill="#eef5ee"/>',
    ]
    for percent in (-2, -1, 0, 1, 2):
        y = upwards(percent)
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{f"{percent:+d}" if percent else "0"}%</text>'
        )
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        if first < size < last:
            parts.append(
                f'<text x="{across(size):.1f}" y="{height - bottom + 18}" text-anchor="middle">{size} GB</text>'
            )
    for row in rows:
        x, y = across(row["simulated"] / 2**30), upwards(row["percent"])
        title = f"{row['model']}, {row['length']}, {row['levers']}, {row['phase']}: {row['percent']:+.2f}%"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[row["phase"]]}" fill-opacity="0.6">'
            f"<title>{title}</title></circle>"
        )
    for place, phase in enumerate(PHASES):
        x = left + 10 + 80 * place
        parts.append(f'<circle cx="{x}" cy="14" r="4" fill="{COLOURS[phase]}"/><text x="{x + 8}" y="18">{phase}</text>')
    parts.append(f'<text x="{width - 20}" y="18" text-anchor="end">planned over simulated bytes of tensors</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_suffix(path.suffix + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
