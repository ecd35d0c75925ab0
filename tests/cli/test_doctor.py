"""The doctor's findings, on this machine and on imagined ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qrosa import ops
from qrosa.cli import doctor
from qrosa.cli.main import cli


def test_json_is_one_document_and_nothing_is_broken_here() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    document = json.loads(done.stdout)
    assert done.exit_code == 0
    assert document["ok"] is True
    names = [check["name"] for check in document["checks"]]
    assert names == list(doctor._CHECKS)
    for check in document["checks"]:
        assert check["state"] in ("ok", "note", "problem")
        assert check["state"] == "ok" or check["hint"], check


def test_table_shows_every_check() -> None:
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in doctor._CHECKS)


def test_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert doctor.check_torch().state == "broken"
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["ok"] is False


def test_a_card_that_torch_cannot_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in doctor.check_card().found
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA_VISIBLE_DEVICES" in str(doctor.check_card().hint)


def test_a_missing_op_library_is_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"cpu": {"library": None, "isa": "portable", "note": "the library was not built"}}
    monkeypatch.setattr(ops, "status", lambda: status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor.check_ops()
    assert check.state == "problem"
    assert "not built" in check.found
    assert "pip install" in str(check.hint)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.check_libraries().state == "broken"
    assert doctor.check_deepspeed().state == "note"
    assert "wandb" in str(doctor.check_extras().hint)


def test_little_room_and_no_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    assert doctor.check_disk().state == "note"
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert doctor.check_disk().state == "problem"


def test_offline_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor.check_hub().state == "ok"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.check_hub().state == "note"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(doctor._CHECKS, "bitsandbytes", fail)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert "libcudart" in done.stdout
