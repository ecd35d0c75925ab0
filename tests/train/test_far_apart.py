"""Machines that step on their own: what they agree on, what one that dies costs, what each can do alone.

A machine is a process here, with the variables that a launcher sets on each of several machines.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qrosa.config import make_run_config
from qrosa.errors import InputError
from qrosa.record.checkpoint import checkpoint_steps
from qrosa.train.rejoin import newest_common
from qrosa.train.run import find_machines, finetune
from tests.conftest import _review_row
from tests.train.conftest import losses
from tests.train.launch import adapter, ranks, start_machines, wait_machines


@pytest.fixture(scope="module")
def values(tiny_model_dir, tmp_path_factory):
    """``values("name", sync_every=2)``: settings of a short run, in a folder of its own."""
    folder = tmp_path_factory.mktemp("apart")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(_review_row(index)) + "\n" for index in range(24)))

    def make(name, **changes):
        return {
            "model": str(tiny_model_dir()),
            "data": str(rows),
            "output": str(folder / name),
            "budget": "4%",
            "batch_size": 7,
            "max_steps": 9,
            "sync_every": 3,
            "outer_lr": 0.8,
            "outer_momentum": 0.5,
            "warmup_steps": 2,
            "mask_samples": 4,
            "lr": 5e-3,
            "sparse_lr": 1e-3,
            "eval_split": "20%",
            **changes,
        }

    return make


def run(values, **options):
    ended = wait_machines(start_machines(values, **options))
    assert [status for status, _ in ended.values()] == [0] * len(ended), [
        errors[-2000:] for _, errors in ended.values()
    ]
    return Path(values["output"])


def lose(values, victim, step):
    """Run until a machine dies after a step, which ends the others: they do not wait, and do not go on alone."""
    ended = wait_machines(start_machines(values, kill_at={victim: step}))
    assert ended[victim][0] == -9, ended[victim][1][-2000:]
    assert ended[1 - victim][0] not in (0, -9)
    return Path(values["output"])


def machine(run, index):
    return run.with_name(f"{run.name}.machine-{index}")


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(values):
    """A run of two machines that nothing happened to."""
    return run(values("whole"))


def test_both_machines_end_with_one_adapter_and_keep_checkpoints_of_their_meetings(whole):
    first, second = ranks(whole)
    assert first == second
    assert checkpoint_steps(whole) == checkpoint_steps(machine(whole, 1)) == [9, 6]
    assert list(losses(whole)) == list(range(1, 10)) == list(losses(machine(whole, 1)))
    assert losses(whole) != losses(machine(whole, 1))  # each logs the loss of its own rows


def test_a_machine_that_dies_and_comes_back_costs_nothing_but_time(values, whole):
    """Between two meetings, in the middle of the run: the others end, and all go on to the bits of the whole run."""
    lost = values("lost")
    folder = lose(lost, 1, 5)
    assert checkpoint_steps(folder)[0] == checkpoint_steps(machine(folder, 1))[0] == 3
    run(lost, resume=True)
    assert same(adapter(folder), adapter(whole))
    assert losses(folder) == losses(whole)


def test_a_machine_without_its_files_is_sent_them(values, whole):
    lost = values("disk")
    folder = lose(lost, 0, 8)
    shutil.rmtree(machine(folder, 1))
    run(lost, resume=True)
    assert len(set(ranks(folder))) == 1
    assert checkpoint_steps(machine(folder, 1)) == [9, 6]
    assert list(losses(folder)) == list(range(1, 10))


def test_a_machines_folder_is_a_run_of_its_own(values, whole, tmp_path):
    """The first machine is gone for good: another one's folder takes its place, and the run ends on one machine."""
    lost = values("gone")
    folder = lose(lost, 0, 8)
    shutil.rmtree(folder)
    machine(folder, 1).rename(folder)
    report = finetune(make_run_config(lost), resume=True)
    assert report["steps"] == 9 and list(losses(folder)) == list(range(1, 10))


def test_machines_started_with_other_settings_are_refused(values):
    ended = wait_machines(start_machines(values("other"), own={1: {"seed": 1}}))
    assert all(status for status, _ in ended.values())
    assert "machine 2 was started with other settings" in ended[0][1]
    assert "--seed is not the same on this machine" in ended[1][1]
    assert not Path(values("other")["output"]).exists()


def test_a_step_needs_a_row_for_each_process(config):
    with pytest.raises(InputError, match="has none for some of 2 processes"):
        find_machines(config(sync_every=2, batch_size=1), SimpleNamespace(num_processes=2))
    assert find_machines(config(), SimpleNamespace(num_processes=2)) is None


def test_where_machines_go_on():
    assert newest_common([{9, 6}, {9, 6}]) == 9
    assert newest_common([{9, 6}, {6, 3}]) == 6  # the second died before it had written the last one
    assert newest_common([{9, 6}, set()]) == 9  # it is new, and is sent it
    assert newest_common([{9, 6}, {3}]) == 9
    assert newest_common([set(), {9}]) is None


def test_one_machine_may_meet_itself(values):
    """Rate 1 without momentum takes the machine's own move whole: the run without meetings, but for its rounding."""
    plain = finetune(make_run_config(values("plain", sync_every=1)))
    alone = finetune(make_run_config(values("alone", outer_lr=1.0, outer_momentum=0.0)))
    assert alone["loss"]["last"] == pytest.approx(plain["loss"]["last"], rel=1e-2)
