"""A tiny base in fp32, rows of unequal length, and the dense gradient that masks are checked against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears, replace_module
from qrosa.base.load import load_base
from qrosa.masks.selection_rows import Sample


@pytest.fixture
def base(tiny_model_dir: Callable[..., Path]) -> Any:
    """A freshly loaded two-layer Llama, computing in fp32."""
    return load_base(str(tiny_model_dir("llama")), dtype=torch.float32)[0]


@pytest.fixture(scope="session")
def rows() -> list[Sample]:
    """Five rows of 8 to 24 tokens, loss on the second half of each."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (8, 24, 13, 9, 17):
        tokens = torch.randint(0, 512, (length,), generator=generator).tolist()
        made.append(Sample(tokens, [-100] * (length // 2) + tokens[length // 2 :]))
    return made


@pytest.fixture(scope="session")
def dense_gradients() -> Callable[[Any, list[Sample]], list[dict[str, Tensor]]]:
    """``dense_gradients(model, rows)``: each row's gradients; see ``_dense_gradients``."""
    return _dense_gradients


def _dense_gradients(model: Any, rows: list[Sample]) -> list[dict[str, Tensor]]:
    """Each row's gradient of every decoder matrix, by autograd on a dense fp32 copy; destroys the model."""
    weights = {}
    for path, layer in quantized_linears(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data.copy_(layer.effective_weight())
        weights[path] = linear.weight
        replace_module(model, path, linear)
    found = []
    for row in rows:
        loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    return found
