"""`qrosa export` end to end on a tiny run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from qrosa.cli.main import cli
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]


def _run(*args: object) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, args)])


@pytest.fixture
def run(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path], make_adapter: MakeAdapter) -> Path:
    """A run folder with an adapter and the config that names its rows."""
    _, folder = make_adapter(tiny_model_dir())
    settings = {"model": str(tiny_model_dir()), "output": str(folder), "data": str(tiny_rows(count=40)), "rank": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_json_with_verify_on_the_run_s_own_rows(run: Path, tmp_path: Path) -> None:
    done = _run(run, "--output", tmp_path / "out", "--verify", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["format"], document["dtype"], document["base"]) == ("safetensors", "fp16", "nf4")
    assert document["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    drift = document["verify"]
    assert drift["rows"] == 32 and drift["mean_kl"] < 1e-3 and abs(drift["loss_difference"]) < 0.01
    assert "## Drift" in (tmp_path / "out" / "README.md").read_text()


def test_text_output_other_rows_and_peft(run: Path, tmp_path: Path, tiny_rows: Callable[..., Path]) -> None:
    rows = tiny_rows(count=5, name="others.jsonl")
    done = _run(run / "adapter", "--output", tmp_path / "a", "--dtype", "bf16", "--verify", "--data", rows)
    assert done.exit_code == 0 and "drift over 5 rows" in done.stdout, done.output
    done = _run(run, "--output", tmp_path / "b", "--format", "peft", "--json")
    assert json.loads(done.stdout)["format"] == "peft" and json.loads(done.stdout)["verify"] is None
    done = _run(run, "--output", tmp_path / "d", "--format", "gguf", "--quant", "q8_0", "--json")
    assert json.loads(done.stdout)["files"] == ["Modelfile", "README.md", "model.gguf"], done.output
    done = _run(run, "--output", tmp_path / "d", "--format", "gguf", "--force", "--json")
    assert json.loads(done.stdout)["dtype"] == "f16", done.output
    done = _run(run, "--output", tmp_path / "c", "--base-only", "--dtype", "bf16", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["dtype"] == "bf16", done.output


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_verify_on_answers_that_are_compared(
    run: Path, tmp_path: Path, tiny_rows: Callable[..., Path], objective: str
) -> None:
    """A run's own rows, and the same given to a run of another objective."""
    rows: list[dict[str, Any]] = [{"prompt": "the film", "chosen": " good", "rejected": " bad"}] * 3
    if objective == "kto":
        rows = [{"prompt": "the film", "completion": " good", "label": index % 2 == 0} for index in range(6)]
    data = tiny_rows(rows, name=f"{objective}.jsonl")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    other = _run(run, "--output", tmp_path / "other", "--verify", "--data", data)
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"data": str(data), "objective": objective}))
    own = _run(run, "--output", tmp_path / "own", "--verify")
    for done in (other, own):
        assert done.exit_code == 0 and "drift over 6 rows" in done.stdout, done.output


def test_a_checkpoint_of_the_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", run / "checkpoints" / "step-3")
    done = _run(run / "checkpoints" / "step-3", "--output", tmp_path / "out", "--verify")
    assert done.exit_code == 0 and "drift over 32 rows" in done.stdout, done.output


def test_a_moved_base(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(), tmp_path / "base")
    _, folder = make_adapter(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the film was", "completion": " good"}) + "\n")
    done = _run(folder, "--output", tmp_path / "out")
    assert done.exit_code == 2 and "--model" in done.stderr
    done = _run(
        folder, "--output", tmp_path / "out", "--model", tmp_path / "moved", "--verify", "--data", rows, "--json"
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--dtype", "fp8"), 2, "fp8"),
        (("--format", "gguf", "--dtype", "bf16"), 2, "--quant is GGUF's"),
        (("--quant", "q8_0"), 2, "is for --format gguf"),
        (("--format", "gguf", "--quant", "q4_0"), 2, "q4_0"),
        (("--format", "peft", "--base-only"), 2, "--base-only does not go with"),
        (("--base-only", "--verify"), 2, "leave out one of the two"),
        (("--format", "peft", "--dtype", "bf16"), 2, "--dtype does not go with"),
        (("--format", "peft", "--verify"), 2, "--verify does not go with"),
        (("--data", "x.jsonl"), 2, "only used by --verify"),
        (("--verify", "--data", "missing.jsonl"), 2, "missing.jsonl"),
        (("--device", "nonsense"), 2, "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_leaves_nothing(args: tuple[str, ...], code: int, words: str, run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = _run(run, "--output", tmp_path / "out", *args, "--json")
    assert done.exit_code == code, done.output
    assert done.stdout == "" and words in done.stderr and done.stderr.count("hint: ") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_in_the_way(run: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    for output in (run, tiny_model_dir()):
        for force in ((), ("--force",)):
            done = _run(run, "--output", output, *force)
            assert done.exit_code == 2, done.output
    assert (run / "adapter").is_dir() and (tiny_model_dir() / "model.safetensors").is_file()


def test_rows_that_are_gone(run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    Path(settings["data"]).unlink()
    done = _run(run, "--output", tmp_path / "out", "--verify")
    assert done.exit_code == 2 and "--data" in done.stderr and not (tmp_path / "out").exists()


def test_disk_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qrosa.export import folder

    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    done = _run(run, "--output", tmp_path / "out")
    assert done.exit_code == 5 and "free" in done.stderr and not (tmp_path / "out").exists()
