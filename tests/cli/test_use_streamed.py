"""Finished runs on a device that does not hold their base: the same figures and the same words, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.real_models import HUB, MODELS
from qrosa.base.shape import from_config
from qrosa.cli.main import cli
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.inference import beside_base_bytes, resident_blocks
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]
GB = 2**30


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [*map(str, arguments), "--json"])


@pytest.fixture
def source(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_model_dir())[1]


@pytest.mark.parametrize("offload", ["base", "base=disk:blocks"])
def test_eval_gives_the_same_figures(
    source: Path, tiny_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = run("eval", source, "--data", tiny_rows())
    streamed = run("eval", source, "--data", tiny_rows(), "--offload", offload)
    assert plain.exit_code == streamed.exit_code == 0, streamed.output
    assert json.loads(plain.stdout) == json.loads(streamed.stdout)
    assert (tmp_path / "blocks").exists() == ("disk" in offload)


def test_generate_gives_the_same_words(source: Path) -> None:
    asked = ("generate", source, "--prompt", "the film was", "--max-new-tokens", 8, "--device", "cpu")
    plain, streamed = run(*asked), run(*asked, "--offload", "base")
    assert plain.exit_code == streamed.exit_code == 0, streamed.output
    words = [json.loads(done.stdout) for done in (plain, streamed)]
    assert {k: v for k, v in words[0].items() if "second" not in k and "_per_s" not in k} == {
        k: v for k, v in words[1].items() if "second" not in k and "_per_s" not in k
    }


@pytest.mark.parametrize("offload", ["activations", "optimizer", "everything"])
def test_offload_that_is_for_training(source: Path, offload: str) -> None:
    done = run("generate", source, "--prompt", "good", "--offload", offload)
    assert done.exit_code == 2 and "--offload" in done.stderr and "hint:" in done.stderr


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-14B"])
def test_as_many_blocks_stay_as_fit(name: str) -> None:
    shape = from_config(name, MODELS[name].config)
    kept = [resident_blocks(shape, size * GB, adapter=2**28) for size in (4, 6, 8, 24)]
    assert kept[-1] is None and kept[0] is not None and kept[0] < shape.dims.layers
    for free, resident in zip((4, 6, 8), kept, strict=False):
        if resident:
            taken = parts.streamed_base_bytes(shape, resident) + beside_base_bytes(shape, 2**28)
            assert taken <= free * GB
    counts = [shape.dims.layers if blocks is None else blocks for blocks in kept]
    assert counts == sorted(counts)


def test_a_70b_model_is_used_on_24_gb() -> None:
    name = "meta-llama/Llama-3.1-70B-Instruct"
    resident = resident_blocks(from_config(name, HUB[name]), 23 * GB, adapter=2**30)
    assert resident is not None and 20 <= resident < 80
