"""A run in processes of its own, as torchrun starts them, and what the tests read from its folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

# One process may die by itself (kill_at), and each leaves the digest of its own masks and values beside the run.
_WORKER = """
import hashlib, json, os, signal, sys
import torch
import qrosa.train.run as run
from qrosa.adapters.inject import adapter_state
from qrosa.config import make_run_config

values, resume, kill_at, victim = json.loads(sys.argv[1])
torch.set_num_threads(1)

step = run.TrainingLoop._step

def step_or_die(self):
    step(self)
    if self.parts.state.step == kill_at and os.environ.get("RANK", "0") == victim:
        os.kill(os.getpid(), signal.SIGKILL)

run.TrainingLoop._step = step_or_die
finish = run._Run._finish

def leave_digest(self, parts):
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_state(parts.model).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    with open(f"{values['output']}/rank{os.environ.get('RANK', '0')}", "w") as file:
        file.write(digest.hexdigest())
    return finish(self, parts)

run._Run._finish = leave_digest
run.finetune(make_run_config(values), resume=resume)
"""


def launch(values, *, processes=1, resume=False, kill_at=None, environment=None):
    """Run settings in ``processes`` processes on the CPU; returns what subprocess says of it."""
    arguments = json.dumps([values, resume, kill_at, "0"])
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    command = [sys.executable, "-c", _WORKER, arguments]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, "--no-python", *command]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=200)


def start_machines(values, count=2, *, only=None, resume=False, kill_at=None, own=None, environment=None):
    """Start a run on ``count`` machines of one process each, all of them this one.

    Args:
        values: Settings.
        count: Machines of the run.
        only: Indices of those to start; default all.
        resume: Go on with the run.
        kill_at: Machine -> step after which it is killed.
        own: Machine -> settings of its own.
        environment: More variables.

    Returns:
        Machine -> its ``Popen``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {}
    for machine in range(count) if only is None else only:
        mine = {**values, **(own or {}).get(machine, {})}
        arguments = json.dumps([mine, resume, (kill_at or {}).get(machine), str(machine)])
        surroundings = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(machine),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            **(environment or {}),
        }
        started[machine] = subprocess.Popen(
            [sys.executable, "-c", _WORKER, arguments],
            env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    return started


def wait_machines(started):
    """Machine -> (exit status, stderr) once all have ended."""
    ended = {machine: (*process.communicate(timeout=200), process.returncode) for machine, process in started.items()}
    return {machine: (status, errors) for machine, (_, errors, status) in ended.items()}


def adapter(run):
    """The adapter's tensors."""
    return load_file(Path(run) / "adapter" / "adapter.safetensors")


def ranks(run):
    """What each process says that its adapter is."""
    return [path.read_text() for path in sorted(Path(run).glob("rank*"))]
