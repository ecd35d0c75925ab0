"""A whole quantised model: what any tool reads, what the repair adds, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import load_run_or_model
from qrosa.base.load import load_base
from qrosa.calibrate import quantize as module
from qrosa.calibrate.quantize import quantize
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.errors import InputError
from tests.conftest import TINY_FAMILIES

ROWS = [torch.randint(0, 460, (70,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(20)]
IDS = torch.randint(0, 460, (2, 20), generator=torch.Generator().manual_seed(99))


def settings(model: Path, output: Path, **changes: Any) -> QuantizeConfig:
    config = QuantizeConfig(str(model), str(output), density=0.02, rank=2, rows=16, length=48, held_out=4)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def made(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A quantised tiny Llama with both parts of the repair, and its report."""
    folder = tmp_path_factory.mktemp("quantised") / "base"
    return folder, quantize(settings(tiny_model_dir("llama"), folder), ROWS)


def test_bitsandbytes_gives_the_same_logits(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours, _ = load_base(str(folder))
    for path, layer in quantized_linears(ours).items():
        linear = theirs.get_submodule(path)
        assert isinstance(linear, Linear4bit), path
        decoded = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(layer.weight.dequantize(decoded.dtype), decoded), path
    with torch.no_grad():
        mine, other = ours(IDS).logits.float(), theirs(IDS).logits.float()
    # The weights are equal to the bit; both compute in bf16, in sums of their own order (1% from fp32 each).
    assert float((mine - other).norm() / other.norm()) < 0.02


def test_every_matrix_is_nearer_than_nearest(made: tuple[Path, dict[str, Any]]) -> None:
    _, report = made
    assert len(report["matrices"]) == 14
    for path, error in report["matrices"].items():
        assert 0 < error["here"] < 0.7 * error["nearest"], path


def test_the_folder_is_used_like_a_run(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    model, _, adapter = load_run_or_model(str(folder))
    assert adapter == folder / "adapter"
    layers = quantized_linears(model).values()
    assert all(layer.rank == 2 and layer.low_rank.scale == 1 for layer in layers)
    size = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(layer.nnz for layer in layers) == pytest.approx(0.02 * size, abs=14)


def test_the_repair_brings_the_weights_back(made: tuple[Path, dict[str, Any]], tiny_model_dir: Any) -> None:
    folder, _ = made
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    with torch.no_grad():
        expected = original(IDS).logits
        repaired = load_run_or_model(str(folder))[0](IDS).logits.float()
        nearest = load_base(str(tiny_model_dir("llama")))[0](IDS).logits.float()
    assert float((repaired - expected).square().mean()) < 0.6 * float((nearest - expected).square().mean())


def test_the_folder_may_move(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made[0], tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "adapter" / "adapter_config.json").read_text())
    assert config["base"]["source"] == ".."
    assert load_run_or_model(str(tmp_path / "elsewhere"))[2] is not None


def test_lists_exactly_its_files(made: tuple[Path, dict[str, Any]]) -> None:
    folder, report = made
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    shards = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)} | {"model.safetensors.index.json"}
    adapter = {"adapter/adapter.safetensors", "adapter/adapter_config.json"}
    assert names == tokenizer | shards | adapter | {
        "config.json",
        "generation_config.json",
        "report.json",
        "report.html",
    }
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert not folder.with_name("base.work").exists()


class StoppedError(Exception):
    pass


def test_goes_on_after_a_stop_and_gives_the_same_bytes(
    made: tuple[Path, dict[str, Any]], tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_model_dir("llama"), tmp_path / "base")
    real, calls = module.quantize_matrices, []

    def once(linears: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(next(iter(linears)))
        if len(calls) == 2:
            raise StoppedError
        return real(linears, *args, **kwargs)

    monkeypatch.setattr(module, "quantize_matrices", once)
    with pytest.raises(StoppedError):
        quantize(config, ROWS)
    assert not (tmp_path / "base").exists()
    quantize(config, ROWS)
    assert [path.split(".")[2] for path in calls] == ["0", "1", "1"]  # the block that was done is not done again
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "adapter/adapter.safetensors"):
        assert (tmp_path / "base" / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_other_rows_do_not_go_on_with_old_work(tiny_model_dir: Any, tmp_path: Path) -> None:
    config = settings(tiny_model_dir("llama"), tmp_path / "base", rank=0, density=0.0)
    work = tmp_path / "base.work"
    work.mkdir()
    (work / "identity.json").write_text("{}")
    (work / "model-00001-of-00003.safetensors").write_text("of other rows")
    report = quantize(config, ROWS)
    assert report["perplexity"].keys() == {"original", "nearest", "base"}
    assert not (tmp_path / "base" / "adapter").exists()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_writes_its_own_rows(family: str, tiny_model_dir: Any, tmp_path: Path) -> None:
    config = settings(tiny_model_dir(family), tmp_path / "base", rank=0, rows=6, length=24, held_out=2)
    report = quantize(config)
    assert report["calibration"] == {"windows": 6, "tokens": 144}
    load_run_or_model(str(tmp_path / "base"))


def test_refuses_what_is_in_4_bits(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already in 4 bits"):
        quantize(settings(made[0], tmp_path / "again"))


def test_refuses_a_folder_of_something_else(tiny_model_dir: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        quantize(settings(tiny_model_dir("llama"), tmp_path), ROWS)
    with pytest.raises(InputError, match="no quantised model"):
        quantize(settings(tiny_model_dir("llama"), tmp_path), ROWS, force=True)


def test_refuses_too_few_rows(tiny_model_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two windows"):
        quantize(settings(tiny_model_dir("llama"), tmp_path / "base"), [[1, 2, 3]])
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_stays(made: tuple[Path, dict[str, Any]], tiny_model_dir: Any) -> None:
    before: Tensor = torch.get_rng_state()
    assert quantize(settings(tiny_model_dir("llama"), made[0]), ROWS, force=True)["held_out"]
    assert torch.equal(torch.get_rng_state(), before)
