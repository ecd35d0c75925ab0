"""Offloaded boundaries give the bits of plain checkpointing, and the host holds them only until they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import trainable_parameters
from qrosa.model.modes import set_checkpointing
from qrosa.offload.activations import ActivationOffload
from tests.conftest import save_tiny_model

IDS = torch.arange(60).view(2, 30)


def gradients(folder: Path, offload: ActivationOffload | None, dropout: float = 0.3) -> tuple[torch.Tensor, list[Any]]:
    model, _ = qrosa.load(folder, qrosa.AdapterConfig(rank=4, dropout=dropout))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    model.activation_checkpointing_enable({"use_reentrant": False})
    if offload is not None:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload.checkpoint)
    torch.manual_seed(11)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    if offload is not None:
        assert offload.held == model.config.num_hidden_layers
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in trainable_parameters(model)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_bit_equal_to_plain_checkpointing(tiny_model_dir: Callable[..., Path], family: str) -> None:
    offload = ActivationOffload("cpu")
    plain_loss, plain = gradients(tiny_model_dir(family), None)
    loss, offloaded = gradients(tiny_model_dir(family), offload)
    assert torch.equal(plain_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in offloaded)
    assert offload.held == 0


def test_live_boundaries_do_not_grow_with_depth(tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, tiny_tokenizer, num_hidden_layers=6)
    offload = ActivationOffload("cpu")
    most = 0
    bring_back = offload._bring_back

    def watched(boundary: Any) -> None:
        nonlocal most
        bring_back(boundary)
        most = max(most, sum(kept.returned is not None for kept in boundary.through.held))

    offload._bring_back = watched  # type: ignore[method-assign]
    gradients(tmp_path, offload)
    assert most <= 2


def test_a_pass_that_was_broken_off_leaves_nothing_behind(tiny_model_dir: Callable[..., Path]) -> None:
    """Out of memory in the loss: the boundaries go with the graph, and the next pass finds only its own."""
    model, _ = qrosa.load(tiny_model_dir("llama"), qrosa.AdapterConfig(rank=4))
    offload = ActivationOffload("cpu")
    set_checkpointing(model, True)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload.checkpoint)

    def broken_off() -> None:
        output = model(input_ids=IDS, use_cache=False)
        assert output.logits.requires_grad and offload.held == model.config.num_hidden_layers
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError):
        broken_off()
    assert offload.held == 0
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert offload.held == 0


def test_blocks_that_backward_does_not_reach_keep_nothing(tiny_model_dir: Callable[..., Path]) -> None:
    model, _ = qrosa.load(tiny_model_dir("llama"), qrosa.AdapterConfig(rank=4))
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    offload = ActivationOffload("cpu")
    set_checkpointing(model, True)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload.checkpoint)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert offload.held == model.config.num_hidden_layers - 1
    loss.backward()
    assert offload.held == 0


def test_without_gradients_nothing_is_kept() -> None:
    offload = ActivationOffload("cpu")
    with torch.no_grad():
        assert offload.checkpoint(lambda hidden: hidden + 1, torch.zeros(2)).sum() == 2
    assert offload.held == 0
