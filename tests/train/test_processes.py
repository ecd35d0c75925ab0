"""Two processes that share each step's rows do the run that one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from qrosa.config import make_run_config
from qrosa.train.run import finetune
from tests.train.conftest import losses

_WORKER = """
import json, sys, torch
from qrosa.config import make_run_config
from qrosa.train.run import finetune
torch.set_num_threads(1)
print(json.dumps(finetune(make_run_config(json.loads(sys.argv[1])))))
"""


def test_two_processes_equal_one(settings, tmp_path):
    values = settings(max_steps=6, batch_size=7, dropout=0.0, eval_split="20%", warmup_steps=2)
    finetune(make_run_config({**values, "output": str(tmp_path / "one")}))
    run_in_two({**values, "output": str(tmp_path / "two")}, tmp_path)
    one, both = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == both.keys()
    # The same rows in other micro-batches: bf16 rounding only.
    assert all(abs(both[step] - one[step]) < 0.01 * one[step] for step in one)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["eval"]["supervised_tokens"] == reports[1]["eval"]["supervised_tokens"]
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2


def test_two_processes_agree_on_the_drift(settings, tiny_rows, tmp_path):
    """Rows with labels: each process pairs its own rows, and what they tell each other is told in step."""
    rows = [{"prompt": f"film {n}", "completion": " good" * (1 + n % 3), "label": n % 2 == 0} for n in range(24)]
    data = str(tiny_rows(rows, name="judged.jsonl"))
    values = settings(
        objective="kto", data=[data], max_steps=4, batch_size=6, dropout=0.0, eval_split="20%", warmup_steps=2
    )
    finetune(make_run_config({**values, "output": str(tmp_path / "one")}))
    run_in_two({**values, "output": str(tmp_path / "two")}, tmp_path)
    one, both = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == both.keys()
    assert all(abs(both[step] - one[step]) < 0.01 * one[step] for step in one)  # other mismatches, nearly as likely
    evaluations = [json.loads((tmp_path / name / "report.json").read_text())["eval"] for name in ("one", "two")]
    assert evaluations[0]["rows"] == evaluations[1]["rows"] == 5
    assert abs(evaluations[0]["loss"] - evaluations[1]["loss"]) < 0.01


def run_in_two(values, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    # Nothing tells accelerate to use the CPU: where there is no card, each process would take itself for the only one.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    environment.pop("ACCELERATE_USE_CPU", None)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker), json.dumps(values)]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
