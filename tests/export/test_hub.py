"""Exports to the hub, against a stand-in of its client: what is asked before, and what is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub.errors import LocalTokenNotFoundError

from qrosa.cli.main import cli
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]

ME = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """What was asked of the hub, and what it answers."""

    def __init__(self) -> None:
        self.user: dict[str, Any] | Exception = ME
        self.fault: Exception | None = None
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.sent: dict[str, Any] = {}

    def whoami(self) -> dict[str, Any]:
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def create_repo(self, repo: str, **options: Any) -> str:
        self.made.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        if self.fault is not None:
            raise self.fault
        self.sent[repo_id] = {path.name for path in Path(folder_path).iterdir()}
        return SimpleNamespace(oid="0123456789abcdef")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return stand_in


@pytest.fixture
def run(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_model_dir())[1]


def export(run: Path, *arguments: object) -> Any:
    return CliRunner().invoke(cli, ["export", str(run), *map(str, arguments)])


@pytest.mark.parametrize(
    ("named", "whole", "form"), [("model", "me/model", "safetensors"), ("us/model", "us/model", "peft")]
)
def test_an_export_is_uploaded_whole_and_private(
    run: Path, tmp_path: Path, hub: Hub, named: str, whole: str, form: str
) -> None:
    done = export(run, "--output", tmp_path / "out", "--format", form, "--push-to", named, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["pushed"] == {"repo": whole, "url": f"https://hub/{whole}", "commit": "0123456789abcdef"}
    assert hub.made == [(whole, {"private": True, "exist_ok": True})]
    assert hub.sent == {whole: {path.name for path in (tmp_path / "out").iterdir()}}
    assert set(document["files"]) == hub.sent[whole]


def test_public_is_asked_for_and_said_where_it_is(run: Path, tmp_path: Path, hub: Hub) -> None:
    done = export(run, "--output", tmp_path / "out", "--push-to", "model", "--public")
    assert done.exit_code == 0 and "uploaded: https://hub/me/model (commit 0123456789ab)" in done.stdout
    assert hub.made[0][1]["private"] is False
    assert json.loads(export(run, "--output", tmp_path / "other", "--json").stdout)["pushed"] is None


@pytest.mark.parametrize(
    ("user", "repo", "error"),
    [
        (LocalTokenNotFoundError("no token"), "model", "nobody is logged in to the hub"),
        (ConnectionError("no route"), "model", "the hub does not answer to this login: no route"),
        ({**ME, "auth": {"accessToken": {"role": "read"}}}, "model", "the login of me may only read"),
        (ME, "them/model", "me may not write to them"),
        (ME, "no name", "is no name of a repository"),
        (ME, "a/b/c", "is no name of a repository"),
    ],
)
def test_refused_before_any_work(run: Path, tmp_path: Path, hub: Hub, user: Any, repo: str, error: str) -> None:
    hub.user = user
    done = export(run, "--output", tmp_path / "out", "--push-to", repo)
    assert done.exit_code == 2 and error in done.stderr and "hint: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    assert not (tmp_path / "out").exists() and hub.made == []


def test_offline_is_refused_before_any_work(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.user = AssertionError("the hub was asked")
    done = export(run, "--output", tmp_path / "out", "--push-to", "model")
    assert done.exit_code == 2
    first, second = done.stderr.strip().splitlines()
    assert first == "error: --push-to model needs the hub, and HF_HUB_OFFLINE is set"
    assert "hf upload REPO FOLDER" in second
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_leaves_the_export(run: Path, tmp_path: Path, hub: Hub) -> None:
    hub.fault = ConnectionError("the line is cut")
    done = export(run, "--output", tmp_path / "out", "--push-to", "model")
    assert done.exit_code == 5 and done.stdout == ""
    assert f"{tmp_path / 'out'} is written, and the hub did not take it into me/model: the line is cut" in done.stderr
    assert f"hf upload me/model {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_public_alone_is_refused(run: Path, tmp_path: Path) -> None:
    done = export(run, "--output", tmp_path / "out", "--public")
    assert done.exit_code == 2 and "--public is only used by --push-to" in done.stderr
