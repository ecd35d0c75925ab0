"""Runs over the tiny model, small enough to be made by the dozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qrosa.config import make_run_config
from qrosa.train.callbacks import Callback

# A process of its own for what cannot be tested in one: being killed. It dies after reporting step `kill_at`.
_WORKER = """
import json, os, signal, sys
import torch
from qrosa.config import make_run_config
from qrosa.train.callbacks import Callback
from qrosa.train.run import finetune

values, resume, kill_at, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)

class Killer(Callback):
    def on_step(self, record):
        if record.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

finetune(make_run_config(values), resume=resume, callbacks=[Killer()])
"""


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.notices, self.steps, self.evaluations = [], [], []

    def on_notice(self, text):
        self.notices.append(text)

    def on_step(self, record):
        self.steps.append(record)

    def on_evaluation(self, step, result):
        self.evaluations.append((step, result["loss"]))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def settings(tiny_model_dir, tiny_rows, tmp_path):
    """``settings(max_steps=20, ...)``: flat settings of a run over 24 rows."""

    def make(**values):
        defaults = {
            "model": str(tiny_model_dir()),
            "data": str(tiny_rows(count=24)),
            "output": str(tmp_path / "run"),
            "budget": "4%",
            "batch_size": 6,
            "max_steps": 6,
            "warmup_steps": 2,
            "mask_samples": 8,
            "lr": 5e-3,
            "sparse_lr": 1e-3,
            "lr_warmup": 0.1,
        }
        merged = {**defaults, **values}
        if values.get("rank") is not None:
            merged["budget"] = None
        return merged

    return make


@pytest.fixture
def config(settings):
    """``config(max_steps=20, ...)``: the same as a ``RunConfig``."""
    return lambda **values: make_run_config(settings(**values))


@pytest.fixture
def run_in_process():
    """``run_in_process(values, kill_at=8)``: a run in a process of its own; returns its exit status."""

    def run(values, *, resume=False, kill_at=None):
        arguments = json.dumps([values, resume, kill_at, torch.get_num_threads()])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        return done

    return run


def losses(run):
    """Step -> loss of a run folder's log; fails when a step stands there twice."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["phase"] != "select"]
    assert steps == sorted(set(steps))
    return {line["step"]: line["loss"] for line in lines if line["phase"] != "select"}
