"""What `qrosa inspect` says is what the files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qrosa.adapters.inject import quantized_linears, trainable_parameters
from qrosa.cli.main import cli
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]


def _run(*args: str) -> Any:
    return CliRunner().invoke(cli, ["inspect", *args])


def test_json(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> None:
    model, run = make_adapter(tiny_model_dir())
    done = _run(str(run), "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    layers = {path: layer for path, layer in quantized_linears(model).items() if layer.adapter_parameters()}
    assert set(document["modules"]) == set(layers)
    for path, layer in layers.items():
        module = document["modules"][path]
        assert (module["rank"], module["nnz"], tuple(module["shape"])) == (layer.rank, layer.nnz, layer.weight.shape)
        assert module["density"] == layer.nnz / (layer.out_features * layer.in_features)
    assert document["trainable"] == sum(parameter.numel() for parameter in trainable_parameters(model))
    assert document["base"]["fingerprint"] == model.qrosa_base.fingerprint
    assert document["rank"] == {"min": 1, "max": 3} and document["nnz"] == 350
    assert document["bytes"] == (run / "adapter" / "adapter.safetensors").stat().st_size


def test_the_base_is_not_needed(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(), tmp_path / "base")
    _, run = make_adapter(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    assert _run(str(run / "adapter")).exit_code == 0


def test_table_by_kind_and_by_module(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> None:
    _, run = make_adapter(tiny_model_dir())
    short, long = _run(str(run)).stdout, _run(str(run), "--modules").stdout
    assert "q_proj" in short and "model.layers.0.self_attn.q_proj" not in short
    assert "model.layers.0.self_attn.q_proj" in long
    assert "350 values" in short and "rank         1 to 3" in short


def test_no_adapter_and_parts_that_do_not_belong_together(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    done = _run(str(tiny_model_dir()))
    assert done.exit_code == 2 and "error: " in done.stderr and "hint: " in done.stderr
    _, run = make_adapter(tiny_model_dir())
    _, other = make_adapter(tiny_model_dir(), sparse=False, name="other")
    shutil.copy(other / "adapter" / "adapter.safetensors", run / "adapter" / "adapter.safetensors")
    done = _run(str(run))
    assert done.exit_code == 5 and "do not belong together" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("name", ["inspect", "eval", "export", "generate"])
def test_help_has_examples(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0 and "Examples:" in done.output and f"qrosa {name}" in done.output
