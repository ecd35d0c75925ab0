"""What happens to a run from outside: other processes, lost files, closed terminals, hostile folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrosa.errors import InputError, InterruptedRunError, StorageError
from qrosa.record.lock import LOCK_FILE, RunLock
from qrosa.train.interrupt import Interrupts
from qrosa.train.run import finetune
from tests.train.conftest import Recorder, losses
from tests.train.test_resume import Stop


@pytest.fixture
def stopped(config):
    """A run that was stopped after step 3 of 6, and its folder."""
    with pytest.raises(InterruptedRunError):
        finetune(config(save_every=2, eval_split="20%", eval_every=2), callbacks=[Stop(3)])
    return config(save_every=2, eval_split="20%", eval_every=2), Path(config().output)


def everything(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force": True}], ids=["fresh", "resume", "force"])
def test_a_folder_in_use_is_refused_and_left_alone(stopped, how):
    settings, run = stopped
    with RunLock(run) as lock:
        lock.acquire()
        before = everything(run)
        with pytest.raises(InputError, match=f"is in use by process {os.getpid()}"):
            finetune(settings, **how)
        assert everything(run) == before
    assert not (run / LOCK_FILE).exists()


def test_two_that_start_at_once_make_one_run(config):
    """The second finds the folder absent, as the first did, and is refused when it comes to writing."""
    run = Path(config().output)

    class Intruder(Recorder):
        def on_phase(self, name, done, total):
            if name == "load" and done == total and not run.exists():
                run.mkdir()
                lock.acquire()

    lock = RunLock(run)
    with lock, pytest.raises(InputError, match="is in use by"):
        finetune(config(), callbacks=[Intruder()])
    assert list(run.iterdir()) == []


def test_a_killed_holder_holds_nothing(stopped):
    settings, run = stopped
    code = (
        "import os, signal, sys; from pathlib import Path; from qrosa.record.lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)]).returncode == -signal.SIGKILL
    assert (run / LOCK_FILE).exists()
    assert finetune(settings, resume=True)["steps"] == 6
    assert not (run / LOCK_FILE).exists()


def test_a_launcher_whose_processes_did_not_meet_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="started 2 processes, and 1 of them found each other"):
        finetune(config())
    assert not Path(config().output).exists()


@pytest.mark.parametrize("loss", ["gone", "empty", "cut", "garbage"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_a_lost_log_does_not_cost_the_run(stopped, tmp_path, loss, name):
    settings, run = stopped
    log = run / name
    if loss == "gone":
        log.unlink()
    else:
        log.write_bytes({"empty": b"", "cut": log.read_bytes()[:-9], "garbage": b"\xff\x00" * 4000}[loss])
    recorder = Recorder()
    assert finetune(settings, resume=True, callbacks=[recorder])["steps"] == 6
    assert [record.step for record in recorder.steps] == [4, 5, 6]
    assert any(f"{name} lost" in text for text in recorder.notices) == (loss != "garbage")
    assert {4, 5, 6} <= set(losses(run))


def test_a_stored_state_cannot_reach_outside(stopped, tmp_path):
    """As someone would write it who knows the format: with the digest made to fit."""
    from qrosa.files import document_digest

    settings, run = stopped
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    path = run / "checkpoints" / "step-3" / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    state["logs"] |= {"../victim.txt": 0, str(victim): 3}
    path.write_text(json.dumps({**state, "sha256": document_digest(state)}))
    finetune(settings, resume=True)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["checkpoints", "adapter", "metrics.jsonl", "plan.json", "logs", "adapter/x", "README.md"]
)
@pytest.mark.parametrize("how", [{"resume": True}, {"force": True}], ids=["resume", "force"])
def test_links_that_lead_out_are_refused(stopped, tmp_path, name, how):
    settings, run = stopped
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_text("precious")
    if (run / name).exists():
        (run / name).rename(tmp_path / "aside")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(InputError, match="is a link"):
        finetune(settings, **how)
    assert [path.name for path in outside.iterdir()] == ["victim.txt"]


def test_a_temporary_name_that_is_a_link_is_not_written_through(stopped, tmp_path):
    settings, run = stopped
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    for name in ("report.json.tmp", "README.md.tmp", "metrics.jsonl.tmp", "plan.json.tmp"):
        (run / name).symlink_to(victim)
    (run / "metrics.jsonl").unlink()  # so that it is written anew
    finetune(settings, resume=True)
    assert victim.read_text() == "precious"


PROJECT = {
    "config.yaml": "model: resnet\n", "README.md": "my project", "logs/mine.txt": "mine",
    "checkpoints/step-1000/model.bin": "weights", "adapter/notes.txt": "notes", "src.py": "code",
}  # fmt: skip


def lay_out(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_force_does_not_touch_a_project_with_names_like_a_runs(config, tmp_path):
    run = Path(config().output)
    lay_out(run, PROJECT)
    with pytest.raises(InputError, match="is not a qrosa run"):
        finetune(config(), force=True)
    assert everything(run) == {run / name: text.encode() for name, text in PROJECT.items()}


def test_force_deletes_what_the_run_wrote_and_nothing_else(config, tmp_path):
    finetune(config(max_steps=3))
    run = Path(config().output)
    mine = {name: text for name, text in PROJECT.items() if name != "config.yaml"}
    lay_out(run, mine)
    finetune(config(max_steps=2, warmup_steps=1, log_to=()), force=True)
    assert {name: (run / name).read_text() for name in mine} == mine
    assert list(losses(run)) == [1, 2]
    assert not (run / "checkpoints" / "step-3").exists()


@pytest.mark.parametrize("left", [["config.yaml.tmp"], ["run.json"], ["run.json", "config.yaml.tmp", ".lock"]])
def test_a_run_killed_before_its_settings_were_written_is_no_dead_end(config, left):
    run = Path(config().output)
    lay_out(run, dict.fromkeys(left, ""))
    assert finetune(config(max_steps=2))["steps"] == 2


def test_all_checkpoints_damaged_is_no_silent_new_beginning(stopped):
    settings, run = stopped
    for folder in (run / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"all \d checkpoints of .* are damaged"):
        finetune(settings, resume=True)


def test_places_are_stored_from_the_root(config, tiny_model_dir, monkeypatch):
    import yaml

    run = Path(config().output)
    monkeypatch.chdir(run.parent)
    finetune(config(max_steps=2, data="rows.jsonl"))
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["data"] == [str(run.parent / "rows.jsonl")]


def test_a_closed_terminal_is_a_request_to_stop():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.requested == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def command(settings):
    """``qrosa finetune`` in a process of its own, with these settings."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    return [sys.executable, "-m", "qrosa", "finetune", *flags]


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_run_goes_on_where_nobody_reads_its_progress(settings, tmp_path, reader):
    values = settings(max_steps=3)
    if reader == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command(values), stdout=subprocess.DEVNULL, stderr=full, timeout=200)
    else:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command(values), stdout=subprocess.DEVNULL, stderr=write, timeout=200)
        os.close(write)
    assert done.returncode == 0
    assert (Path(values["output"]) / "report.json").exists()


_HUNG = """
import os, sys, time
from qrosa.train.step import StepRunner
from qrosa.cli.main import main
gradients = StepRunner.gradients
def hang(self, rows, step, normaliser):
    if os.environ["RANK"] == "1" and step == 1:
        time.sleep(600)
    return gradients(self, rows, step, normaliser)
StepRunner.gradients = hang
main()
"""


def test_a_process_that_hangs_ends_the_run_within_the_time_set(settings, tmp_path):
    values = settings(max_steps=3, timeout=15.0)
    (tmp_path / "hung.py").write_text(_HUNG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    done = subprocess.run(
        [*torchrun, str(tmp_path / "hung.py"), *command(values)[3:]],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "has not answered within --timeout" in done.stderr, done.stderr[-3000:]
    assert "bug in qrosa" not in done.stderr
    assert time.monotonic() - begun < 200
