"""A streamed base computes the bits of a resident one, with at most two blocks and the resident ones on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import quantized_linears, trainable_parameters
from qrosa.offload.packing import FlatWeight, to_disk, to_host
from qrosa.offload.pool import HostPool
from qrosa.offload.streaming import BaseStream, spread
from tests.conftest import save_tiny_model

IDS = torch.arange(60).view(2, 30)
LAYERS = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    save_tiny_model("llama", folder, tiny_tokenizer, num_hidden_layers=LAYERS)
    return folder


def load(folder: Path) -> Any:
    model, _ = qrosa.load(folder, qrosa.AdapterConfig(rank=4, dropout=0.2))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def step(model: Any) -> tuple[torch.Tensor, list[Any]]:
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in trainable_parameters(model)]


def on_host(chunk: int = 1 << 16) -> Callable[[str, Any], FlatWeight]:
    pool = HostPool(pinned=False, chunk=chunk)
    return lambda _, weight: to_host(weight, pool)


def flatten(model: Any, place: Callable[[str, Any], FlatWeight]) -> dict[str, FlatWeight]:
    return {path: place(path, layer.weight) for path, layer in quantized_linears(model).items()}


@pytest.mark.parametrize("resident", [0, 1, 3, LAYERS - 1, LAYERS])
def test_bit_equal_to_a_resident_base(deep: Path, resident: int) -> None:
    plain, streamed = load(deep), load(deep)
    stream = BaseStream(streamed, flatten(streamed, on_host()), "cpu", resident)
    for _ in range(2):  # the second step starts where the first left the slots
        (expected_loss, expected), (loss, found) = step(plain), step(streamed)
        assert torch.equal(expected_loss, loss)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    plain.eval(), streamed.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(plain(IDS).logits, streamed(IDS).logits)
    stream.close()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, streamed(IDS).logits)


def test_only_two_blocks_and_the_resident_ones_are_on_the_device(deep: Path) -> None:
    model = load(deep)
    flats = flatten(model, on_host())
    block = sum(flat.nbytes for flat in flats.values()) // LAYERS
    assert BaseStream(model, flats, "cpu", 0).device_bytes == 2 * block
    assert BaseStream(load(deep), flats, "cpu", 3).device_bytes == 5 * block
    assert BaseStream(load(deep), flats, "cpu", LAYERS).device_bytes == LAYERS * block


def test_each_block_is_fetched_once_a_pass(deep: Path) -> None:
    model = load(deep)
    stream = BaseStream(model, flatten(model, on_host()), "cpu", 0)
    fetched: list[int] = []
    copy = stream._copy

    def watched(block: int, slot: Any) -> None:
        fetched.append(block)
        copy(block, slot)

    stream._copy = watched  # type: ignore[method-assign]
    step(model)
    # Forward fetches every block; backward starts from the two that are still there.
    assert fetched == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    fetched.clear()
    step(model)
    assert fetched == [2, 3, 4, 5, 3, 2, 1, 0]


def test_without_checkpointing_autograd_refuses(deep: Path) -> None:
    model = load(deep)
    model.activation_checkpointing_disable()
    BaseStream(model, flatten(model, on_host()), "cpu", 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model)


def test_mapped_files_hold_the_same_bits(deep: Path, tmp_path: Path) -> None:
    plain, streamed = load(deep), load(deep)
    BaseStream(streamed, flatten(streamed, lambda path, w: to_disk(w, tmp_path / "base", path)), "cpu", 1)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 7 * LAYERS
    assert torch.equal(step(plain)[0], step(streamed)[0])


def test_flat_weights_keep_every_tensor(tmp_path: Path) -> None:
    weight = qrosa.QRosaLinear.from_linear(torch.nn.Linear(70, 33)).weight
    for flat in (to_host(weight, HostPool(pinned=False)), to_disk(weight, tmp_path, "w")):
        again = flat.weight()
        assert again.shape == weight.shape
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in weight.tensors().items())


def test_resident_blocks_are_spread() -> None:
    assert list(spread(8, 2)) == [2, 6]
    assert list(spread(5, 0)) == []
    assert list(spread(4, 9)) == [0, 1, 2, 3]
