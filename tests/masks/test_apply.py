"""Mask selection from Python, on a model with a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qrosa
from qrosa.adapters.inject import quantized_linears
from qrosa.config import AdapterConfig, MaskConfig
from qrosa.errors import InputError
from qrosa.masks.apply import select_masks
from qrosa.masks.selection_rows import Sample


@pytest.mark.parametrize("sparse_init", ["residual", "zero"])
def test_the_budget_is_spent_and_the_sparse_part_trains(
    sparse_init: str, tiny_model_dir: Callable[..., Path], rows: list[Sample]
) -> None:
    settings = AdapterConfig(rank=2, density=0.01, sparse_init=sparse_init)
    model, _ = qrosa.load(str(tiny_model_dir("llama")), settings)
    positions = select_masks(model, rows)
    layers = quantized_linears(model)
    assert sum(layer.nnz for layer in layers.values()) == model.qrosa_allocation.sparse_parameters > 0
    for path, layer in layers.items():
        assert torch.equal(layer.sparse_delta().positions(), positions[path])
        assert bool(layer.sparse_values.any()) == (sparse_init == "residual")
    row = rows[1]
    model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
    assert all(layer.sparse_values.grad.any() for layer in layers.values())
    assert model.training


def test_it_is_exported() -> None:
    assert qrosa.select_masks is select_masks


def test_a_model_without_a_sparse_budget_is_told_so(tiny_model_dir: Callable[..., Path], rows: list[Sample]) -> None:
    model, _ = qrosa.load(str(tiny_model_dir("llama")))
    with pytest.raises(InputError, match="no budget for a sparse part"):
        select_masks(model, rows)
    path = next(iter(quantized_linears(model)))
    assert select_masks(model, rows, nnz={path: 9}, config=MaskConfig(mask_score="random"))[path].numel() == 9


def test_an_already_quantised_base_warns(tiny_model_dir: Callable[..., Path], rows: list[Sample]) -> None:
    import dataclasses

    model, _ = qrosa.load(str(tiny_model_dir("llama")), AdapterConfig(rank=2, density=0.01))
    model.qrosa_base = dataclasses.replace(model.qrosa_base, kind="nf4")
    with pytest.warns(UserWarning, match="starts at zero"):
        select_masks(model, rows)
