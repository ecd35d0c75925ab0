"""Machines that a slow link joins: gradients summed in every step, against steps on their own and meetings.

    python bench/bench_far_apart.py --write --lose      # as root, on Linux; some hours of two busy cores
    python bench/bench_far_apart.py --machines 2 --every 20 --seeds 1 --more="--outer-lr=0.8 --outer-momentum=0.85"

Each machine is a process in a network namespace of its own, with a link of 20 Mbit/s and a round trip of 80 ms
(bench/far_link.py), started as on machines apart: with run folders of their own. The model is the first two layers of
SmolLM2-135M-Instruct with its embeddings, so that two cores can carry four machines; it learns to go on with film
reviews, three words after six. ``bytes`` are what the first machine really sent, everything included: the first values,
the masks, evaluations and what TCP adds. ``seconds`` are those of steps and meetings. With --lose a machine is
killed in the middle of a run and comes back. Writes bench/results/far-apart-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file, save_file

from bench.assets import movie_reviews, smollm2
from bench.far_link import INTERFACE, FarLink
from bench.measure import RESULTS, report

MBIT, ROUND_TRIP = 20.0, 80.0
LAYERS, TRAIN_ROWS, TEST_ROWS = 2, 3200, 300
GIVEN, LEARNT = 6, 3  # words
CASE = ("machines", "every", "seed", "steps", "more")
FLAGS = ["--batch-size=8", "--budget=0.6%", "--warmup-steps=0", "--mask-samples=16"]


def first_layers(folder: Path, layers: int) -> Path:
    """A model of the first layers of SmolLM2, with its embeddings, last norm and tokenizer."""
    shutil.copytree(smollm2(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(folder.glob("*.safetensors"))
    tensors = {
        name: tensor
        for path in names
        for name, tensor in load_file(path).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    for path in [*names, *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(folder: Path) -> None:
    """``train.jsonl`` and ``test.jsonl``, disjoint: the beginning of a review, and how it goes on."""
    texts = sorted({text for text, _ in movie_reviews("rotten_tomatoes") if len(text.split()) >= GIVEN + LEARNT})
    random.Random(0).shuffle(texts)
    for name, taken in (("train", texts[:TRAIN_ROWS]), ("test", texts[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS])):
        rows = [
            {"prompt": " ".join(words[:GIVEN]), "completion": " " + " ".join(words[GIVEN : GIVEN + LEARNT])}
            for words in (text.split() for text in taken)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def start(link: FarLink, machine: int, flags: list[str], home: Path) -> subprocess.Popen[bytes]:
    """One machine's ``qrosa finetune``, with a run folder of its own."""
    environment = {
        **os.environ,
        "RANK": str(machine),
        "WORLD_SIZE": str(len(link.names)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": link.address(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    output = home / f"machine-{machine}" / "run"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qrosa", "finetune", f"--output={output}", *flags]
    log = (output.parent / "log").open("ab")
    return subprocess.Popen(link.command(machine, command), env=environment, stdout=log, stderr=log)


def finish(machines: list[subprocess.Popen[bytes]], home: Path) -> None:
    """Wait for all of them.

    Raises:
        RuntimeError: One failed.
    """
    for machine, process in enumerate(machines):
        if process.wait():
            raise RuntimeError((home / f"machine-{machine}" / "log").read_text()[-2000:])


def measure(world: Path, machines: int, every: int, seed: int, steps: int, *more: str) -> dict[str, Any]:
    """One run over the link."""
    home = world / f"{machines}-{every}-{seed}-{'-'.join(more)}"
    with FarLink(machines, MBIT, ROUND_TRIP) as link:
        finish(
            [start(link, machine, flags(world, every, seed, steps, *more), home) for machine in range(machines)], home
        )
        sent = link.sent[0]
    told = json.loads((home / "machine-0" / "run" / "report.json").read_text())
    row = {"machines": machines, "every": every, "seed": seed, "steps": told["steps"], "more": " ".join(more)}
    return row | {"loss": told["eval"]["loss"], "bytes": sent, "seconds": told["seconds"]}


def flags(world: Path, every: int, seed: int, steps: int, *more: str) -> list[str]:
    """What every machine is started with."""
    places = [f"--model={world / 'model'}", f"--data={world / 'train.jsonl'}", f"--eval-data={world / 'test.jsonl'}"]
    return [*places, *FLAGS, f"--sync-every={every}", f"--seed={seed}", f"--max-steps={steps}", *more]


def write(rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Put rows beside those of other calls that are in the results already; a case measured anew takes their place."""
    there = RESULTS / "far-apart-cpu.json"
    before = json.loads(there.read_text()) if there.exists() else {"rows": []}
    cases = {tuple(row[key] for key in CASE): row for row in [*before["rows"], *rows]}
    lost = {"lost": before["lost"]} if "lost" in before else {}
    report("far-apart", list(cases.values()), **(lost | more))


def lose_one(world: Path, steps: int, seed: int = 1, every: int = 20) -> dict[str, Any]:
    """The second of two machines is killed in the middle, ends the first one too, and both come back: what was lost?"""
    whole, home = world / f"2-{every}-{seed}-", world / "lost"
    if not whole.exists():
        measure(world, 2, every, seed, steps)
    made = flags(world, every, seed, steps)
    with FarLink(2, MBIT, ROUND_TRIP) as link:
        running = [start(link, machine, made, home) for machine in range(2)]
        log = home / "machine-1" / "run.machine-1" / "metrics.jsonl"
        while lines_of(log) < steps // 2 + every // 2:
            time.sleep(0.2)
        running[1].kill()
        killed = time.monotonic()
        running[0].wait()
        noticed, done = time.monotonic() - killed, lines_of(log)
        finish([start(link, machine, [*made, "--resume"], home) for machine in range(2)], home)
    ends = [load_file(path / "machine-0" / "run" / "adapter" / "adapter.safetensors") for path in (whole, home)]
    same = ends[0].keys() == ends[1].keys() and all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])
    return {"every": every, "killed_after": done, "noticed_after_seconds": noticed, "same_adapter": same}


def lines_of(log: Path) -> int:
    """Steps that a machine has logged."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum('"select"' not in line for line in lines)


def main() -> None:
    """Read the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--more", default="", help="more settings of every run, in quotes")
    parser.add_argument("--lose", action="store_true", help="at last kill a machine in the middle of a run")
    parser.add_argument("--write", action="store_true", help="add to the results, instead of printing only")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        first_layers(world / "model", LAYERS)
        write_rows(world)
        more: dict[str, Any] = {"layers": LAYERS, "test_rows": TEST_ROWS, "mbit": MBIT, "round_trip_ms": ROUND_TRIP}
        for seed in asked.seeds:
            for machines in asked.machines:
                for every in asked.every:
                    rows.append(measure(world, machines, every, seed, asked.steps, *asked.more.split()))
                    if asked.write:
                        write(rows, more)
                    else:
                        print(json.dumps(rows[-1]), flush=True)
        if asked.lose:
            more["lost"] = lose_one(world, asked.steps)
            print(json.dumps(more["lost"]), flush=True)
        if asked.write:
            write(rows, more)


if __name__ == "__main__":
    main()
