"""A run in processes of its own, as torchrun starts them, and what the tests read from its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

# Each process may die by itself (kill_at), and leaves the digest of its own masks and values beside the run.
_WORKER = """
import hashlib, json, os, signal, sys
import torch
import qrosa.train.run as run
from qrosa.adapters.inject import adapter_state
from qrosa.config import make_run_config
from qrosa.train.callbacks import Callback

values, resume, kill_at = json.loads(sys.argv[1])
torch.set_num_threads(1)

class Killer(Callback):
    def on_step(self, record):
        if record.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

finish = run._Run._finish

def leave_digest(self, parts):
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_state(parts.model).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    with open(f"{values['output']}/rank{os.environ.get('RANK', '0')}", "w") as file:
        file.write(digest.hexdigest())
    return finish(self, parts)

run._Run._finish = leave_digest
run.finetune(make_run_config(values), resume=resume, callbacks=[Killer()])
"""


def launch(values, *, processes=1, resume=False, kill_at=None, environment=None):
    """Run settings in ``processes`` processes on the CPU; returns what subprocess says of it."""
    arguments = json.dumps([values, resume, kill_at])
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


def adapter(run):
    """The adapter's tensors."""
    return load_file(Path(run) / "adapter" / "adapter.safetensors")


def ranks(run):
    """What each process says that its adapter is."""
    return [path.read_text() for path in sorted(Path(run).glob("rank*"))]
