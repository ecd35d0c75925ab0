"""Recomputation without the products that nobody reads: the same losses and gradients, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qrosa.adapters.inject import adapter_parameters, quantized_linears
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.load import load_base
from qrosa.config import AdapterConfig
from qrosa.data.batching import MicroBatch
from qrosa.model.modes import offload_activations, set_checkpointing
from qrosa.ops.products import widening
from qrosa.sparse.csr import CsrDelta
from qrosa.train.loss import model_loss

IDS = torch.arange(40).view(2, 20) % 50 + 3


def trained(folder: Path, dropout: float) -> Any:
    """A tiny base with both parts, the low-rank one at work."""
    model, _ = load_base(str(folder))
    torch.manual_seed(0)
    attach_adapter(model, AdapterConfig(rank=4, density=0.0, dropout=dropout))
    for layer in quantized_linears(model).values():
        layer.set_sparse(CsrDelta.from_mask(torch.rand(layer.out_features, layer.in_features) < 0.02))
        for parameter in layer.adapter_parameters().values():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model: Any) -> list[torch.Tensor]:
    """The loss and every gradient."""
    torch.manual_seed(1)
    loss, _ = model_loss(model, MicroBatch(IDS, torch.ones_like(IDS), IDS.clone(), [0, 1]))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for group in adapter_parameters(model) for p in group)]


class Products(TorchDispatchMode):
    """Counts forward calls of the layer's kernels, with the rows of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.qrosa.linear.default:
            self.rows.append(args[7])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_equal_to_the_bit(family: str, dropout: float, wide: bool, tiny_model_dir: Callable[..., Path]) -> None:
    results = []
    with widening("cpu", wide):
        for checkpointing in (False, True):
            model = trained(tiny_model_dir(family), dropout)
            set_checkpointing(model, checkpointing)
            results.append(step(model))
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("family", "unread"), [("llama", ["mlp.down_proj"]), ("gemma2", []), ("qwen3", ["mlp.down_proj"])]
)
def test_which_outputs(family: str, unread: list[str], tiny_model_dir: Callable[..., Path]) -> None:
    model = trained(tiny_model_dir(family), 0.0)
    set_checkpointing(model, True)
    set_checkpointing(model, True)  # as where memory ran out: watched once
    with Products() as products:
        step(model)
    layers = quantized_linears(model)
    found = {path.split(".", 3)[-1] for path, layer in layers.items() if layer.output_unread}
    assert sorted(found) == unread
    assert len(products.rows) == 2 * len(layers) - 2 * len(unread)  # two blocks


def test_under_activation_offload(tiny_model_dir: Callable[..., Path]) -> None:
    plain = step(trained(tiny_model_dir("llama"), 0.1))
    model = trained(tiny_model_dir("llama"), 0.1)
    set_checkpointing(model, True)
    offload_activations(model, torch.device("cpu"))
    with Products() as products:
        results = step(model)
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(plain, results, strict=True))
    assert len(products.rows) == 2 * len(quantized_linears(model)) - 2


def test_evaluation_reads_every_output(tiny_model_dir: Callable[..., Path]) -> None:
    model = trained(tiny_model_dir("llama"), 0.0)
    set_checkpointing(model, True)
    step(model)
    with torch.no_grad():
        after = model(IDS).logits
        set_checkpointing(model, False)
        assert torch.equal(after, model(IDS).logits)
