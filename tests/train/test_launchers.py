"""The command line under the launchers of several processes: one voice, one exit code, one run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import losses

BIN = Path(sys.executable).parent
QROSA = ["-m", "qrosa.cli.main", "finetune"]


def start(command, tmp_path, settings):
    """Run a launcher with flags made of settings; returns what subprocess says."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, *flags, "--json"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("torchrun", ["--standalone", "--nproc-per-node", "2", *QROSA]),
        ("accelerate", ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                        "--mixed_precision", "no", "--dynamo_backend", "no", "--module", *QROSA[1:]]),
        ("deepspeed", ["--num_gpus", "2", "--no_local_rank", "--module", *QROSA[1:]]),
    ],
    ids=["torchrun", "accelerate", "deepspeed"],
)  # fmt: skip
def test_two_processes_make_one_run(settings, tmp_path, name, command):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if not (BIN / name).exists() and shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    values = settings(max_steps=2, warmup_steps=1, mask_samples=2, deepspeed="zero2", budget="4%")
    done = start([str(BIN / name), *command], tmp_path, values)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(values["output"])) == 2
    printed = done.stdout[done.stdout.index("{\n  ") :]  # deepspeed's launcher logs there, before and after
    assert json.JSONDecoder().raw_decode(printed)[0]["steps"] == 2
    assert done.stderr.count("2 processes") == 1
