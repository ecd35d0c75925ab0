"""What a run was made on: words that are there on any machine."""

import subprocess

import torch

import qrosa
from qrosa.record import machine


def test_device_system_and_versions():
    found = machine.describe_machine(torch.device("cpu"), processes=2)
    assert found["processor"].endswith(" threads") and found["processes"] == "2"
    assert found["torch"] == torch.__version__ and found["qrosa"].startswith(qrosa.__version__)
    assert all(isinstance(text, str) and text for text in found.values())


def test_the_commit_is_that_of_the_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    (tmp_path / ".git").write_text("damaged")
    assert machine.package_commit() is None
    (tmp_path / ".git").unlink()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert machine.package_commit() == head


def test_without_a_clone_pip_s_record_is_asked(monkeypatch, tmp_path):
    class Installed:
        def __init__(self, text):
            self.read_text = lambda name: text

    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    for text, wanted in (('{"vcs_info": {"commit_id": "abc"}}', "abc"), ('{"dir_info": {}}', None), (None, None)):
        monkeypatch.setattr(machine, "distribution", lambda name, text=text: Installed(text))
        assert machine.package_commit() == wanted
