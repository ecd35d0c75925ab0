"""The main job from end to end on real input, as a user would type it: ``make demo``.

SmolLM2-135M-Instruct learns to judge film reviews. Every step is a ``qrosa`` command, shown before it runs: plan,
accuracy of the 4-bit base, fine-tuning of 0.3% of the parameters, accuracy of the result, export to fp16. Then the
exported folder is scored in plain transformers without qrosa, and the model answers two reviews that it has not seen.
Model and reviews come out of pinned packages (``bench/assets.py``); rows and order are fixed by a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.assets import movie_reviews

SEED = 20
TRAIN_ROWS = 2000
TEST_ROWS = 600
LABELS = ("negative", "positive")
SETTINGS = f"--batch-size 16 --seed {SEED}"


@dataclass
class Timings:
    """Seconds of each step that ran, in order."""

    seconds: dict[str, float]

    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds.values())


@dataclass
class Summary:
    """What the demo found: scores before, after and in plain transformers; bytes of training; seconds in all."""

    before: dict[str, Any]
    after: dict[str, Any]
    plain: dict[str, Any]
    planned: int
    measured: int
    seconds: float


def write_rows(folder: Path, train_rows: int, test_rows: int) -> tuple[Path, Path]:
    """Write disjoint, balanced training and test rows as prompt/completion .jsonl files."""
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for text, label in sorted(set(movie_reviews("rotten_tomatoes"))):
        by_label[label].append(text)
    random_order = random.Random(SEED)
    paths = []
    for texts in by_label.values():
        random_order.shuffle(texts)
    for name, start, count in (("test", 0, test_rows), ("train", test_rows, train_rows)):
        rows = [
            {"prompt": f"Review: {text}\nSentiment:", "completion": LABELS[label]}
            for label, texts in by_label.items()
            for text in texts[start // 2 : (start + count) // 2]
        ]
        random_order.shuffle(rows)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(path)
    return paths[1], paths[0]


def run(step: str, command: str, timings: Timings, *, capture: bool = False) -> str:
    """Show a command, run it with this interpreter's environment, and stop the demo if it fails.

    Args:
        step: What the time is booked under.
        command: As typed: ``qrosa ...`` or ``python ...``.
        timings: Where the time is booked.
        capture: Return what it prints on stdout instead of showing it.
    """
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    timings.seconds[step] = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"the demo stops here: the command above left with exit code {done.returncode}")
    if capture:
        print(done.stdout.strip(), flush=True)
    return done.stdout or ""


def score(step: str, command: str, timings: Timings) -> dict[str, Any]:
    """Run a command that prints one JSON document, and read it."""
    return dict(json.loads(run(step, command, timings, capture=True)))


def demo(folder: Path, train_rows: int, test_rows: int, length: str) -> Summary:
    """Run every step in ``folder``, which is emptied first; ``length`` is how long to train, as flags."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    timings = Timings({})
    assets = os.path.relpath(Path(__file__).with_name("assets.py"))
    model = run("fetch the model", f"python {assets} smollm2", timings, capture=True).strip()
    train, test = write_rows(folder, train_rows, test_rows)

    tuned, merged = folder / "run", folder / "merged"
    base = f"--model {model} --data {train} --budget 0.3%"
    run("plan", f"qrosa plan {base} --batch-size 16", timings)
    before = score("eval before", f"qrosa eval {model} --data {test} --json", timings)
    run("finetune", f"qrosa finetune {base} {SETTINGS} {length} --output {tuned}", timings)
    after = score("eval after", f"qrosa eval {tuned} --data {test} --json", timings)
    run("export", f"qrosa export {tuned} --output {merged} --verify", timings)
    script = os.path.relpath(Path(__file__).with_name("reload.py"))
    scored = folder / "plain.json"
    run("plain transformers", f"python {script} {merged} {test} {scored}", timings)
    plain = json.loads(scored.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    for label in LABELS:
        prompt = next(row["prompt"] for row in rows if row["completion"] == label)
        run(f"answer to a {label} review", f"qrosa generate {tuned} --prompt {shlex.quote(prompt)}", timings)
    report = json.loads((tuned / "report.json").read_text(encoding="utf-8"))
    print_summary(before, after, plain, report, timings)
    return Summary(
        before,
        after,
        plain,
        report["memory"]["planned"]["train"],
        report["memory"]["measured"]["train"],
        timings.total(),
    )


def record(summary: Summary, train_rows: int, test_rows: int) -> None:
    """Write the figures where the documents take them from."""
    from bench.measure import report

    rows = [
        {"model": "4-bit base", "accuracy": summary.before["accuracy"], "loss": summary.before["loss"]},
        {
            "model": "fine-tuned, low-rank + sparse",
            "accuracy": summary.after["accuracy"],
            "loss": summary.after["loss"],
        },
        {"model": "merged fp16 in plain transformers", "accuracy": summary.plain["accuracy"], "loss": None},
    ]
    report(
        "demo", rows, train_rows=train_rows, test_rows=test_rows, planned=summary.planned, measured=summary.measured,
        seconds=summary.seconds,
    )  # fmt: skip


def print_summary(
    before: dict[str, Any], after: dict[str, Any], plain: dict[str, Any], report: dict[str, Any], timings: Timings
) -> None:
    """The table that the demo ends with."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"SmolLM2-135M on film reviews: {plain['rows']} held-out rows")
    for heading in ("model", "accuracy", "loss"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row("4-bit base", f"{before['accuracy']:.3f}", f"{before['loss']:.3f}")
    table.add_row("fine-tuned, low-rank + sparse", f"{after['accuracy']:.3f}", f"{after['loss']:.3f}")
    table.add_row("merged fp16 in plain transformers", f"{plain['accuracy']:.3f}", "")
    console.print(table)
    memory = report.get("memory", {})
    planned, measured = memory.get("planned", {}).get("train"), memory.get("measured", {}).get("train")
    if planned and measured:
        console.print(f"training memory: planned {planned / 2**20:,.0f} MiB, measured {measured / 2**20:,.0f} MiB")
    steps = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in timings.seconds.items() if seconds >= 1)
    console.print(f"time: {steps}; {timings.total():.0f} s in all")


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description="Fine-tune, evaluate, export and reload a real model.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes; emptied first")
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS)
    parser.add_argument("--quick", action="store_true", help="every step on a few rows: shows that it runs")
    parser.add_argument("--record", action="store_true", help="write bench/results/demo-cpu.json")
    arguments = parser.parse_args()
    if arguments.quick:
        demo(arguments.folder, 32, 8, "--max-steps 2 --warmup-steps 1")
        return
    summary = demo(arguments.folder, arguments.train_rows, arguments.test_rows, "--epochs 1")
    if arguments.record:
        record(summary, arguments.train_rows, arguments.test_rows)


if __name__ == "__main__":
    main()
