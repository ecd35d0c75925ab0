"""How true the plan of a run on the CPU is: planned against resident memory of the whole process, phase by phase.

    python bench/bench_host_memory.py            # some ten minutes on two cores
    python bench/bench_host_memory.py --only 512

Each setting runs in a process of its own: ``qrosa plan --probe`` on SmolLM2-135M, real steps at the largest micro-batch
of rows that are all as long as the longest. Two settings are whole runs of ``qrosa finetune`` on film reviews, whose
rows differ in length, so that the heap is cut up as it is in use. Writes bench/results/host-memory-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.assets import smollm2
from bench.demo import write_rows
from bench.measure import report

PROBES: dict[str, str] = {
    "64 tokens, 8 rows": "--seq-len 64 --micro-batch 8 --batch-size 8 --budget 0.3%",
    "256 tokens, 4 rows": "--seq-len 256 --micro-batch 4 --batch-size 4 --budget 0.3%",
    "256 tokens, 4 rows, recompute": "--seq-len 256 --micro-batch 4 --batch-size 4 --budget 0.3% --checkpointing on",
    "512 tokens, 4 rows": "--seq-len 512 --micro-batch 4 --batch-size 4 --budget 0.3%",
    "512 tokens, 4 rows, recompute": "--seq-len 512 --micro-batch 4 --batch-size 4 --budget 0.3% --checkpointing on",
    "512 tokens, 2 rows, low-rank": "--seq-len 512 --micro-batch 2 --batch-size 2 --rank 16 --density 0",
    "512 tokens, 2 rows, 1% sparse": "--seq-len 512 --micro-batch 2 --batch-size 2 --rank 8 --density 1%",
    "2048 tokens, 1 row": "--seq-len 2048 --micro-batch 1 --batch-size 1 --budget 0.3%",
    "2048 tokens, 1 row, recompute": "--seq-len 2048 --micro-batch 1 --batch-size 1 --budget 0.3% --checkpointing on",
}
RUNS: dict[str, str] = {
    "reviews, 16 rows": "--batch-size 16 --max-steps 20 --warmup-steps 4 --mask-samples 16 --budget 0.3%",
    "reviews, 16 rows, recompute": "--batch-size 16 --max-steps 12 --warmup-steps 4 --mask-samples 16 --budget 0.3% "
    "--checkpointing on",
}
TIMEOUT = 600


def main() -> None:
    """Run what is asked for, print it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name holds this text; nothing is written then")
    only = parser.parse_args().only
    model, rows = str(smollm2()), []
    for name, flags in PROBES.items():
        if only in name:
            rows += show(name, probed(model, flags.split()))
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in RUNS.items():
            if only in name:
                rows += show(name, trained(model, flags.split(), Path(scratch) / "rows", Path(scratch) / name))
    trains = [row["percent"] for row in rows if row["phase"] == "train"]
    if trains:
        print(f"training: planned is {min(trains):+.1f}% to {max(trains):+.1f}% off what was measured")
    if not only:
        report("host-memory", rows)


def probed(model: str, flags: list[str]) -> dict[str, tuple[int, int]]:
    """Phase -> (planned, measured) of a probe."""
    document = json.loads(_qrosa("plan", "--model", model, "--probe", "--json", *flags))["probe"]
    return {name: (found["planned"], found["measured"]) for name, found in document.items() if isinstance(found, dict)}


def trained(model: str, flags: list[str], rows: Path, output: Path) -> dict[str, tuple[int, int]]:
    """The same of a whole run."""
    rows.mkdir(exist_ok=True)
    train, test = write_rows(rows, 400, 60)
    data = ["--data", str(train), "--eval-data", str(test), "--output", str(output), "--lr", "3e-3"]
    memory = json.loads(_qrosa("finetune", "--model", model, "--json", *data, *flags))["memory"]
    return {name: (memory["planned"][name], size) for name, size in memory["measured"].items()}


def _qrosa(*arguments: str) -> str:
    command = [sys.executable, "-m", "qrosa.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def show(name: str, phases: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Print a setting's phases and give them back as rows."""
    rows = []
    for phase, (planned, measured) in phases.items():
        percent = round(100 * (planned / measured - 1), 2)
        rows.append({"setting": name, "phase": phase, "planned": planned, "measured": measured, "percent": percent})
        print(f"{name:32} {phase:7} {planned / 2**20:8,.0f} {measured / 2**20:8,.0f} MiB {percent:+7.1f}%", flush=True)
    return rows


if __name__ == "__main__":
    main()
