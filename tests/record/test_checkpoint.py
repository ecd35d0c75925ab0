"""Checkpoints: whole or absent, recognised when damaged, refused when they belong to another run."""

import errno

import pytest
import torch

from qrosa.errors import InputError, StorageError
from qrosa.files import write_json, write_tensors
from qrosa.record import checkpoint as module
from qrosa.record.checkpoint import check_same_run, checkpoint_steps, cut_back, latest, prune, save_checkpoint


def save(run, step, **state):
    def write_adapter(folder):
        write_tensors(folder / "adapter.safetensors", {"a": torch.full((3,), float(step))})
        write_json(folder / "adapter_config.json", {"format": "qrosa-adapter"})

    return save_checkpoint(
        run, step, write_adapter=write_adapter, optimizer={"low_rank.master": torch.arange(4.0)}, state=state
    )


def test_a_checkpoint_comes_back(tmp_path):
    save(tmp_path, 3, phase="train")
    found = latest(tmp_path, pytest.fail)
    assert found.step == 3
    assert found.state["phase"] == "train"
    assert torch.equal(found.optimizer_tensors()["low_rank.master"], torch.arange(4.0))
    assert {p.name for p in found.folder.iterdir()} == {
        "adapter.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"
    }  # fmt: skip
    assert [p.name for p in found.folder.parent.iterdir()] == ["step-3"]


def test_none_where_there_is_none(tmp_path):
    assert latest(tmp_path, pytest.fail) is None
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-x").mkdir()
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
    save(tmp_path, 7, phase="warmup")
    save(tmp_path, 7, phase="train")
    assert latest(tmp_path, pytest.fail).state["phase"] == "train"


STATE = {"settings": {"lr": 1e-3, "keep": 2}, "fingerprints": {"model": "m1", "data": "d1"}}


def test_the_same_run_goes_on_and_free_settings_may_change():
    check_same_run(STATE, {"lr": 1e-3, "keep": 5}, {"model": "m1", "data": "d1"})


@pytest.mark.parametrize(
    ("settings", "fingerprints", "words"),
    [
        ({"lr": 2e-3}, {"model": "m1", "data": "d1"}, "--lr was 0.001 .* and is 0.002 now"),
        ({"lr": 4.0}, {"model": "m1", "data": "d1"}, "--lr was 0.001 when the run was started and is 4 now"),
        ({"lr": None}, {"model": "m1", "data": "d1"}, "and is not set now"),
        ({"rank": 8}, {"model": "m1", "data": "d1"}, "--rank was not set when the run was started and is 8 now"),
        ({"lr": 1e-3}, {"model": "m2", "data": "d1"}, "the base has changed"),
        ({"lr": 1e-3}, {"model": "m1", "data": "d2"}, "the data has changed"),
    ],
)
def test_another_run_is_refused_and_says_why(settings, fingerprints, words):
    with pytest.raises(InputError, match=words):
        check_same_run(STATE, settings, fingerprints)


def test_logs_are_cut_back(tmp_path):
    log = tmp_path / "metrics.jsonl"
    cut_back(log, 0)
    log.write_text("one\ntwo\n")
    cut_back(log, 4)
    assert log.read_text() == "one\n"
    with pytest.raises(StorageError, match="shorter"):
        cut_back(log, 5)
