"""The recipes of the benchmark of quantisation are what the product makes, and stay once they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.rounding import RECIPES, Recipe, importance_of, make, make_nearest, put_into
from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import load_run_or_model
from qrosa.base.load import load_base
from qrosa.base.open import open_base
from qrosa.calibrate.quantize import quantize
from qrosa.calibrate.rows import windows
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.files import read_tensors

ROWS = [torch.randint(0, 460, (48,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(12)]


def weights(model: Any, recipe: str, folder: Path) -> dict[str, torch.Tensor]:
    put_into(model, recipe, folder)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_recipe_is_what_quantize_makes(tiny_model_dir: Any, tmp_path: Path) -> None:
    source = str(tiny_model_dir("llama"))
    config = QuantizeConfig(source, str(tmp_path / "made"), density=0.02, rank=2, rows=8, length=48, held_out=4, seed=0)
    quantize(config, ROWS)
    made, _, _ = load_run_or_model(config.output)
    layers = quantized_linears(made)
    deltas = {path: layer.sparse_delta() for path, layer in layers.items()}
    positions = {path: delta.positions() for path, delta in deltas.items() if delta is not None}
    ids = windows(ROWS, 12, 48, 0)[:8]  # the product shuffles its rows and holds the last ones out
    base_files = open_base(source)
    importance = importance_of(base_files, ids, tmp_path / "importance.safetensors")
    make(base_files, ids, {"r": Recipe("mixed", sparse=True, rank=2)}, importance, positions, tmp_path)
    found = weights(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), "r", tmp_path)
    for path, layer in layers.items():
        expected = layer.effective_weight()
        # Stored in bf16: half a unit of 8 bits.
        assert float((found[f"{path}.weight"] - expected).abs().max()) < 2**-8 * float(expected.abs().max()), path


def test_to_nearest_with_exact_values_where_they_are_sparse(tiny_model_dir: Any, tmp_path: Path) -> None:
    source = str(tiny_model_dir("llama"))
    base_files = open_base(source)
    path = "model.layers.1.mlp.up_proj"
    make_nearest(base_files, "n", {path: torch.tensor([3, 70])}, tmp_path)
    found = weights(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), "n", tmp_path)
    nearest = quantized_linears(load_base(source)[0])[path].weight.dequantize(torch.bfloat16).float()
    original = base_files.read(f"{path}.weight").float()
    nearest.view(-1)[[3, 70]] = original.view(-1)[[3, 70]]
    assert torch.equal(found[f"{path}.weight"], nearest)


def test_what_is_made_is_not_made_again(tiny_model_dir: Any, tmp_path: Path) -> None:
    base_files = open_base(str(tiny_model_dir("llama")))
    ids = torch.tensor(ROWS)
    recipes = {name: RECIPES[name] for name in ("feedback, plain maxima", "feedback")}
    make(base_files, ids, recipes, {}, {}, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 * 2
    plain, searched = (read_tensors(file) for file in (files[0], files[2]))
    assert plain.keys() == searched.keys() and not torch.equal(*(next(iter(m.values())) for m in (plain, searched)))
    stamps = [file.stat().st_mtime_ns for file in files]
    files[3].unlink()
    make(base_files, ids, recipes, {}, {}, tmp_path)
    assert [file.stat().st_mtime_ns for file in files[:3]] == stamps[:3] and files[3].is_file()
