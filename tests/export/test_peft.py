"""PEFT itself reads what is written in its format, and computes what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qrosa.adapters.inject import quantized_linears
from qrosa.errors import InputError
from qrosa.export.peft import export_peft, peft_config
from tests.export.conftest import MakeAdapter

IDS = torch.arange(5, 29).view(2, 12)


def _plain_base(folder: Path, model: Any) -> Any:
    """A plain transformers model with the 4-bit base's values, in fp32."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, layer in quantized_linears(model).items():
        plain.get_submodule(path).weight.data = layer.weight.dequantize(torch.float32)
    return plain.eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_peft_gives_the_same_logits(
    family: str, tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir(family), sparse=False)
    report = export_peft(run, tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(report.files)
    base = _plain_base(tiny_model_dir(family), model)
    with torch.no_grad():
        bare = base(IDS).logits
        found = PeftModel.from_pretrained(base, tmp_path / "out")(IDS).logits
        expected = model.float()(IDS).logits
    assert (expected - bare).norm() > 0.05 * bare.norm(), "the adapter changes too little to tell"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_patterns_hold_only_what_differs() -> None:
    ranks = {"model.layers.0.q": 4, "model.layers.0.k": 4, "model.layers.0.v": 2}
    config = peft_config("some/base", ranks, dict.fromkeys(ranks, 16.0) | {"model.layers.0.k": 8.5}, {"dropout": 0.1})
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)
    assert config["rank_pattern"] == {"model.layers.0.v": 2}
    assert config["alpha_pattern"] == {"model.layers.0.k": 8.5}
    assert config["target_modules"] == list(ranks)


def test_layers_without_a_low_rank_part_are_no_targets(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir(), sparse=False)
    export_peft(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [path for path, layer in quantized_linears(model).items() if layer.rank]
    assert len(config["target_modules"]) < len(quantized_linears(model))


def test_a_sparse_part_is_not_lost_silently(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    with pytest.raises(InputError, match=r"lose the sparse part \(350 values\)") as caught:
        export_peft(run, tmp_path / "out")
    assert "--force" in caught.value.hint and not (tmp_path / "out").exists()
    export_peft(run, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_sparse_only_cannot_be_written(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir(), low_rank=False)
    with pytest.raises(InputError, match="no low-rank part"):
        export_peft(run, tmp_path / "out", force=True)


def test_the_bare_base_is_untouched(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> None:
    model, _ = make_adapter(tiny_model_dir(), sparse=False)
    plain = _plain_base(tiny_model_dir(), model)
    for layer in quantized_linears(model).values():
        layer.adapter_enabled = False
    with torch.no_grad():
        torch.testing.assert_close(model.float()(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
