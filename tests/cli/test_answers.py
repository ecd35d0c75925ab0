"""Stdout holds the answer and nothing else, whatever libraries print there while a command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Prints in all the ways that libraries do, at the import of each of these, before anything else of theirs runs.
NOISE = """
import builtins, logging, os, sys
real = builtins.__import__
seen = set()
def noisy(name, *rest, **more):
    top = name.partition(".")[0]
    if top in ("psutil", "safetensors", "transformers", "bitsandbytes", "accelerate", "yaml") and top not in seen:
        seen.add(top)
        print(f"[WARNING] {top} says hello by print")
        os.write(1, f"[WARNING] {top} says hello past Python\\n".encode())
        logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({"msg": f"[WARNING] {top} logs"}))
    return real(name, *rest, **more)
builtins.__import__ = noisy
"""


@pytest.fixture
def noisy(tmp_path: Path) -> dict[str, str]:
    """An environment in which libraries print to stdout."""
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "sitecustomize.py").write_text(NOISE)
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'noise'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}


def answer(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "says hello past Python" in done.stderr, "nothing was printed, so nothing is tested"
    return done.stdout


def test_json_commands_print_one_document(noisy, tiny_model_dir, tiny_rows, tmp_path) -> None:
    model, rows = str(tiny_model_dir()), str(tiny_rows(count=6))
    training = ("--model", model, "--data", rows, "--budget", "5%", "--max-steps", "1", "--warmup-steps", "0")
    for command in (
        ("plan", "--model", model, "--budget", "5%", "--data", rows),
        ("finetune", *training, "--output", str(tmp_path / "dry"), "--dry-run"),
        ("eval", model, "--data", rows),
        ("generate", model, "--prompt", "a film", "--max-new-tokens", "2"),
        ("doctor",),
    ):
        json.loads(answer(noisy, "-m", "qrosa.cli.main", *command, "--json"))


def test_a_closed_pipe_is_no_traceback(noisy, tiny_model_dir) -> None:
    script = f"{sys.executable} -m qrosa.cli.main plan --model {tiny_model_dir()} --budget 5% --json | true"
    done = subprocess.run(["bash", "-c", script], env=noisy, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_reported(noisy, tiny_model_dir) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qrosa.cli.main", *f"plan --model {tiny_model_dir()} --budget 5% --json".split()],
            env=noisy, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 5 and "error:" in done.stderr and "Traceback" not in done.stderr
