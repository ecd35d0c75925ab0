"""Checkpoints: whole or absent, recognised when damaged, refused when they belong to another run."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from qrosa.data.batching import Limits
from qrosa.errors import InputError, StorageError
from qrosa.files import document_digest, write_json, write_tensors
from qrosa.record import checkpoint as module
from qrosa.record.checkpoint import (
    Checkpoint,
    check_same_run,
    checkpoint_steps,
    latest,
    prune,
    recover,
    save_checkpoint,
)
from qrosa.record.state import RunState

SETTINGS = {"lr": 1e-3, "keep": 2}
FINGERPRINTS = {"model": "m1", "data": "d1"}


def save(run, step, **changes):
    def write_adapter(folder):
        write_tensors(folder / "adapter.safetensors", {"a": torch.full((3,), float(step))})
        write_json(folder / "adapter_config.json", {"format": "qrosa-adapter"})

    return save_checkpoint(
        run,
        RunState(Limits(2, 64), 128, 32, step=step, **changes),
        write_adapter=write_adapter,
        optimizer={"low_rank.master": torch.arange(4.0)},
        settings=SETTINGS,
        fingerprints=FINGERPRINTS,
        logs={"metrics.jsonl": 10, "eval.jsonl": 0},
    )


def test_a_checkpoint_comes_back(tmp_path):
    save(tmp_path, 3, selected_at=2)
    found = latest(tmp_path, pytest.fail)
    assert found.step == found.run.step == 3
    assert found.run == RunState(Limits(2, 64), 128, 32, step=3, selected_at=2)
    assert (found.settings, found.fingerprints, found.logs["metrics.jsonl"]) == (SETTINGS, FINGERPRINTS, 10)
    assert torch.equal(found.optimizer_tensors()["low_rank.master"], torch.arange(4.0))
    assert {p.name for p in found.folder.iterdir()} == {
        "adapter.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"
    }  # fmt: skip
    assert [p.name for p in found.folder.parent.iterdir()] == ["step-3"]


def test_none_where_there_is_none(tmp_path):
    assert latest(tmp_path, pytest.fail) is None
    save(tmp_path, 1)
    for name in ("step-x", "step-\u00b2", "step-" + "9" * 200):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint_steps(tmp_path) == [1]


def test_newest_by_number_and_pruning(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path, step)
    assert latest(tmp_path, pytest.fail).step == 10
    prune(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [10, 9]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text('{"step": 5'),
        lambda folder: (folder / "state.json").write_text('{"step": 5}'),
        lambda folder: (folder / "adapter.safetensors").write_bytes(b"short"),
        lambda folder: flip_last_byte(folder / "optimizer.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path, damage):
    save(tmp_path, 4)
    damage(save(tmp_path, 5))
    notices = []
    assert latest(tmp_path, notices.append).step == 4
    assert len(notices) == 1
    assert "step-5 is damaged" in notices[0]


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 7)
    save(tmp_path, 7, selected_at=7)
    assert latest(tmp_path, pytest.fail).run.selected_at == 7
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-7"]


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_while_one_takes_the_place_of_another_neither_is_lost(tmp_path, monkeypatch, renames):
    """Whatever rename is the last that happens, a sound checkpoint of the step is there afterwards."""
    save(tmp_path, 7)
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(source, target):
        if "step-7" in str(target) and str(target).endswith(("step-7", ".old")):
            done.append(target)
            if len(done) == renames:
                raise Killed
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
    with pytest.raises(Killed):
        save(tmp_path, 7, selected_at=7)
    monkeypatch.undo()
    recover(tmp_path)
    assert latest(tmp_path, pytest.fail).run.selected_at is None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-7"]


def rewrite(folder, change):
    """Change state.json and make its digest fit again, as someone who knows the format would."""
    document = json.loads((folder / "state.json").read_text())
    del document["sha256"]
    change(document)
    write_json(folder / "state.json", {**document, "sha256": document_digest(document)})


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["run"].update(step=2),
        lambda state: state["run"].update(step=10**9),
        lambda state: state["run"].update(step="5"),
        lambda state: state["run"]["limits"].update(rows=0),
        lambda state: state["run"]["limits"].update(rows=-1),
        lambda state: state["run"].update(selected_at=-3),
        lambda state: state["run"].update(seconds=float("nan")),
        lambda state: state["run"].update(unknown=1),
        lambda state: state.update(format=99),
        lambda state: state.update(logs=[]),
        lambda state: state["logs"].update({"metrics.jsonl": -1}),
        lambda state: state.pop("settings"),
        lambda state: state.update(runs=state.pop("run")),
    ],
)
def test_a_state_that_does_not_add_up_is_damage(tmp_path, change):
    save(tmp_path, 4)
    rewrite(save(tmp_path, 5), change)
    notices = []
    assert latest(tmp_path, notices.append).step == 4
    assert "step-5 is damaged" in notices[0]


def test_any_byte_of_the_state_matters(tmp_path):
    save(tmp_path, 4)
    path = save(tmp_path, 5) / "state.json"
    sound = path.read_bytes()
    for at in range(0, len(sound), 7):
        changed = bytearray(sound)
        changed[at] ^= 2
        path.write_bytes(changed)
        if sound[at : at + 1].isspace() and bytes(changed[at : at + 1]).isspace():
            continue
        assert latest(tmp_path, lambda _: None).step == 4, sound[at - 20 : at + 20]


def test_all_damaged_is_an_error_and_no_new_beginning(tmp_path):
    (save(tmp_path, 4) / "state.json").write_text("{}")
    with pytest.raises(StorageError, match="all 1 checkpoints"):
        latest(tmp_path, lambda _: None)


def checkpoint():
    return Checkpoint(Path(), 1, RunState(Limits(1, 1), 1, 1), SETTINGS, FINGERPRINTS, {})


def test_the_same_run_goes_on_and_free_settings_may_change():
    check_same_run(checkpoint(), {"lr": 1e-3, "keep": 5}, FINGERPRINTS)


@pytest.mark.parametrize(
    ("settings", "fingerprints", "words"),
    [
        ({"lr": 2e-3}, {"model": "m1", "data": "d1"}, "--lr was 0.001 .* and is 0.002 now"),
        ({"lr": 4.0}, {"model": "m1", "data": "d1"}, "--lr was 0.001 when the run was started and is 4 now"),
        ({"lr": None}, {"model": "m1", "data": "d1"}, "and is not set now"),
        ({"rank": 8}, {"model": "m1", "data": "d1"}, "--rank was not set when the run was started and is 8 now"),
        ({"lr": 1e-3}, {"model": "m2", "data": "d1"}, "the base has changed"),
        ({"lr": 1e-3}, {"model": "m1", "data": "d2"}, "the data has changed"),
        ({"lr": 1e-3, "seed": 7}, {"model": "m1", "data": "d2"}, "--seed was not set .* and is 7 now"),
    ],
)
def test_another_run_is_refused_and_says_why(settings, fingerprints, words):
    with pytest.raises(InputError, match=words):
        check_same_run(checkpoint(), settings, fingerprints)
