"""PEFT itself reads what is written in its format, and computes what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qrosa.adapters.inject import quantized_linears
from qrosa.errors import InputError
from qrosa.export.merge import merge
from qrosa.export.peft import export_peft, lora_config
from qrosa.export.supertuning import Shape
from tests.export.conftest import MakeAdapter

FILE = "adapter_model.safetensors"
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
    config = lora_config("some/base", ranks, dict.fromkeys(ranks, 16.0) | {"model.layers.0.k": 8.5}, 0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 16, 0.1)
    assert config.rank_pattern == {"model.layers.0.v": 2}
    assert config.alpha_pattern == {"model.layers.0.k": 8.5}
    assert config.target_modules == set(ranks)


def test_layers_without_a_low_rank_part_are_no_targets(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir(), sparse=False)
    export_peft(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {path for path, layer in quantized_linears(model).items() if layer.rank}
    assert len(config["target_modules"]) < len(quantized_linears(model))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("low_rank", [True, False], ids=["both", "sparse-only"])
def test_both_parts_in_plain_peft_on_the_exported_base(
    family: str, low_rank: bool, tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir(family), low_rank=low_rank)
    merge(run, tmp_path / "base", base_only=True)
    report = export_peft(run, tmp_path / "out")
    assert report.bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / FILE).values())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        bare = base(IDS).logits
        found = PeftModel.from_pretrained(base, tmp_path / "out")(IDS).logits
        expected = model.float()(IDS).logits
    assert (expected - bare).norm() > 0.05 * bare.norm(), "the adapter changes too little to tell"
    # The base is in fp16, 11 bits of every weight, and some 10 layers pass that on.
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_the_base_alone_is_the_decoded_base(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "from-run", base_only=True)
    merge(tiny_model_dir(), tmp_path / "from-model", base_only=True)
    written = load_file(tmp_path / "from-run" / "model.safetensors")
    for path, layer in quantized_linears(model).items():
        assert torch.equal(written[f"{path}.weight"], layer.weight.dequantize(torch.float32).half()), path
    again = load_file(tmp_path / "from-model" / "model.safetensors")
    assert written.keys() == again.keys() and all(torch.equal(written[name], again[name]) for name in written)
    card = (tmp_path / "from-run" / "README.md").read_text()
    assert "decoded from its 4-bit form" in card and "Trained parameters" not in card
    with pytest.raises(InputError, match="is a base itself"):
        merge(tiny_model_dir(), tmp_path / "x", base_only=True, model=str(tiny_model_dir()))


def test_the_original_base_is_never_loaded_in_place_of_the_decoded_one(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    export_peft(run, tmp_path / "out")
    assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path is None
    assert "--base-only" in (tmp_path / "out" / "README.md").read_text()


class _Layer:
    def __init__(self, rows: int, columns: int, nnz: int) -> None:
        self.weight, self.nnz, self.rank = torch.empty(rows, columns, device="meta"), nnz, 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=6))
def test_every_matrix_has_room_for_its_positions(sizes: list[tuple[int, int, float]]) -> None:
    layers = {str(i): _Layer(n, k, int(share * n * k)) for i, (n, k, share) in enumerate(sizes)}
    shape = Shape.of(layers)  # type: ignore[arg-type]
    assert 0 <= shape.sparsity < 1
    rooms = {key: shape.tensors(*layer.weight.shape)["supertuning_values"][1][0] for key, layer in layers.items()}
    assert all(max(layer.nnz, 1) <= rooms[key] <= layer.weight.numel() for key, layer in layers.items())
    # The densest matrix is not padded: at most one position more, where a float cannot say its share.
    wanted = {key: max(layer.nnz, 1) for key, layer in layers.items()}
    assert min(rooms[key] - wanted[key] for key in layers) <= 1


def test_peft_says_what_our_own_adapter_is(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir())
    with pytest.raises(KeyError, match="a qrosa adapter; for PEFT run: qrosa export RUN"):
        PeftModel.from_pretrained(base, run / "adapter")


def test_without_peft_the_package_is_named(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for sparse, words in ((True, "PEFT 0.21 or newer"), (False, "needs PEFT")):
        _, run = make_adapter(tiny_model_dir(), sparse=sparse, name=f"run{sparse}")
        with pytest.raises(InputError, match=words) as caught:
            export_peft(run, tmp_path / "out")
        assert "pip install" in caught.value.hint and not (tmp_path / "out").exists()


def test_the_example_answers_as_the_merged_model(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "merged", dtype="bf16")
    merge(run, tmp_path / "base", dtype="bf16", base_only=True)
    export_peft(run, tmp_path / "adapter")
    script = Path(__file__).parents[2] / "examples" / "peft_load.py"
    command = [sys.executable, str(script), str(tmp_path / "base"), str(tmp_path / "adapter"), "the film was good"]
    environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("the film was good", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits[0, -1]
    assert done.stdout.splitlines()[0] == f"next token: {tokenizer.decode(merged.argmax())!r}"


def test_the_bare_base_is_untouched(tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter) -> None:
    model, _ = make_adapter(tiny_model_dir(), sparse=False)
    plain = _plain_base(tiny_model_dir(), model)
    for layer in quantized_linears(model).values():
        layer.adapter_enabled = False
    with torch.no_grad():
        torch.testing.assert_close(model.float()(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
