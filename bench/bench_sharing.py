"""Training beside other busy processes: what is left of the speed, against a fair share of the processor.

    python bench/bench_sharing.py                      # some ten minutes on two cores
    python bench/bench_sharing.py --spins 0,1000,10000 # other lengths of spinning before a thread sleeps

Runs of ``qrosa finetune`` on film reviews with all cores, alone and beside one or more processes that do nothing but
compute, one a core at most. A *fair share* is what a scheduler gives to as many threads as there are cores when so many
others want them: cores / (cores + others). Medians over steps, the first ones left out. Writes
bench/results/sharing-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.assets import smollm2
from bench.demo import write_rows
from bench.measure import report

FLAGS = "--batch-size 8 --max-steps 14 --warmup-steps 14 --budget 0.3% --sparse-share 0 --seq-len 128".split()
SETTLING = 4  # steps


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def tokens_per_second(rows: Path, spins: str) -> float:
    """Of a run's steps after the first ones."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "run"
        command = [sys.executable, "-m", "qrosa", "finetune", "--model", str(smollm2()), "--data", str(rows)]
        command += ["--output", str(output), *FLAGS]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"GOMP_SPINCOUNT": spins} if spins else {}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(step["tokens_per_s"] for step in steps[SETTLING:] if "tokens_per_s" in step)


def main() -> None:
    """Read the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", default="", help="values of GOMP_SPINCOUNT, by commas; default: what qrosa sets")
    cores = len(os.sched_getaffinity(0))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = write_rows(Path(folder), 200, 10)
        for spins in parser.parse_args().spins.split(","):
            alone = 0.0
            for others in sorted({0, 1, cores}):
                with busy(others):
                    rate = tokens_per_second(rows, spins)
                alone = alone or rate
                fair = cores / (cores + others)
                row = {"spins": spins or "qrosa's", "cores": cores, "others": others, "tokens_per_s": rate}
                found.append(row | {"of_alone": rate / alone, "fair": fair})
                print(found[-1], flush=True)
    report("sharing", found)


if __name__ == "__main__":
    main()
