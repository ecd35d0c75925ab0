"""Whether ranks by sensitivity do better than ranks in the default order, everything else the same.

    python bench/bench_rank_by.py       # some 8 minutes of one core; writes bench/results/rank-by-cpu.json

SmolLM2-135M-Instruct learns to judge film reviews (rows and prompt of bench/demo.py) within 0.3% of its parameters,
once low-rank only (one rank everywhere fits, and 98k parameters are left to give out) and once with the default sparse
share (not even one rank everywhere fits). Runs with one seed have the same rows in the same order. Few rows and two
seeds: differences below a few points of accuracy say nothing, so the loss of every run is given, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.assets import smollm2
from bench.demo import write_rows
from bench.measure import report
from qrosa.base.adapter_io import load_run_or_model
from qrosa.config import make_run_config
from qrosa.data.dataset import load_rows
from qrosa.eval.tasks import evaluate_tasks
from qrosa.train.run import finetune

SHARES = (0.0, 0.5)
ORDERS = ("order", "sensitivity")


def main() -> None:
    """Train and score every setting, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-rows", type=int, default=160)
    parser.add_argument("--test-rows", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = write_rows(folder, arguments.train_rows, arguments.test_rows)
        for seed in arguments.seeds:
            for share in SHARES:
                for order in ORDERS:
                    run = folder / f"{seed}-{share}-{order}"
                    rows.append(measure(run, train, test, seed=seed, sparse_share=share, rank_by=order))
                    print(json.dumps(rows[-1]), flush=True)
    report("rank-by", rows)


def measure(run: Path, train: Path, test: Path, **settings: Any) -> dict[str, Any]:
    """One run and its score on the held-out rows."""
    fixed = {
        "budget": "0.3%",
        "batch_size": 8,
        "epochs": 1,
        "mask_samples": 32,
        "lr": 3e-3,
        "sparse_lr": 1e-3,
        "save_every": 10_000,
    }
    started = time.perf_counter()
    config = make_run_config({"model": str(smollm2()), "data": str(train), "output": str(run), **fixed, **settings})
    found = finetune(config)
    trained = time.perf_counter() - started
    model, tokenizer, _ = load_run_or_model(str(run))
    scored = evaluate_tasks(model, tokenizer, load_rows(str(test), tokenizer, seq_len=2048).rows)
    return {
        **settings,
        "accuracy": scored["accuracy"],
        "loss": scored["loss"],
        "train_rows": found["data"]["rows"],
        "test_rows": scored["rows"],
        "steps": found["steps"],
        "trainable": found["trainable"],
        "seconds": round(trained, 1),
        "select_bytes": found["memory"]["measured"].get("select"),
        "select_planned": found["memory"]["planned"].get("select"),
        "where": found["where"],
    }


if __name__ == "__main__":
    main()
