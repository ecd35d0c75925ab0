"""Streams, events and waits of the two offloads, step by step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import quantized_linears, trainable_parameters
from qrosa.base.load import load_base
from qrosa.base.open import open_base
from qrosa.model.modes import set_checkpointing
from qrosa.model.place import load_streamed
from qrosa.offload import pool
from qrosa.offload.activations import ActivationOffload
from qrosa.offload.streaming import BaseStream
from qrosa.ops.determinism import deterministic
from tests.card.standin.device import StandIn
from tests.card.standin.timeline import RaceError
from tests.conftest import save_tiny_model

LAYERS = 6
CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    save_tiny_model("llama", folder, tiny_tokenizer, num_hidden_layers=LAYERS)
    return folder


def ready(model: Any) -> Any:
    from qrosa.adapters.inject import inject_low_rank

    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 4))
    set_checkpointing(model, True)
    return model.train()


def backward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float().square().sum()
    loss.backward()
    return loss.detach()


@pytest.fixture
def ids(card: StandIn) -> Iterator[torch.Tensor]:
    with deterministic():
        yield torch.arange(60, device="cuda").view(2, 30)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("disk", [False, True])
def test_a_streamed_base_never_makes_the_host_wait(
    card: StandIn, deep: Path, ids: torch.Tensor, tmp_path: Path, resident: int, disk: bool
) -> None:
    folder = str(tmp_path) if disk else None
    model = ready(load_streamed(open_base(str(deep)), CARD, resident, folder))
    plain = ready(load_base(str(deep), CARD)[0])
    expected = waited(card, plain, ids)
    backward(model, ids)  # the first pass brings the absmax map
    assert waited(card, model, ids) == expected


def waited(card: StandIn, model: Any, ids: torch.Tensor) -> tuple[float, list[str]]:
    """The loss, and what made the host wait for it; not what the reader of files waits for, on a thread of its own."""
    card.waits.clear()
    loss = backward(model, ids)
    found = [wait for wait in card.waits if wait != "synchronising an event"]
    return float(loss.cpu()), found


def test_a_copy_that_fails_leaves_its_block_to_be_entered(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    model = ready(load_streamed(open_base(str(deep)), CARD, 0))
    expected = backward(model, ids)
    model.zero_grad()
    model.get_decoder()(input_ids=ids, use_cache=False)  # leaves the last blocks in the slots
    card.fail_copies = 1
    with pytest.raises(torch.OutOfMemoryError):
        backward(model, ids)
    assert torch.equal(backward(model, ids), expected)


def test_the_stand_in_sees_a_forgotten_wait(
    card: StandIn, deep: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the event of a slot's copy, and without the wait before a slot is used again."""
    model = ready(load_streamed(open_base(str(deep)), CARD, 0))
    stream = torch.cuda.Stream
    with monkeypatch.context() as patch:
        patch.setattr(stream, "wait_event", lambda self, event: None)
        with pytest.raises(RaceError, match="reads before"):
            backward(model, ids)
    model = ready(load_streamed(open_base(str(deep)), CARD, 0))
    monkeypatch.setattr(stream, "wait_stream", lambda self, other: None)
    with pytest.raises(RaceError, match="writes over"):
        backward(model, ids)


def offloaded(deep: Path) -> tuple[Any, ActivationOffload]:
    model = ready(load_base(str(deep), CARD)[0])
    offload = ActivationOffload(CARD)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload.checkpoint)
    return model, offload


def test_two_boundaries_are_on_the_card_however_deep_the_model(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    """One in use, one on its way: after the forward pass five boundaries less than recomputation alone keeps."""
    model, _ = offloaded(deep)
    plain = ready(load_base(str(deep), CARD)[0])
    boundary = 2 * ids.numel() * 64

    def kept(model: Any) -> int:
        before = card.memory.allocated
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        assert hidden.requires_grad
        return card.memory.allocated - before

    assert kept(plain) - kept(model) == (LAYERS - 1) * boundary


def test_offloaded_boundaries_are_in_order_and_leave_nothing(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    model, offload = offloaded(deep)
    plain = ready(load_base(str(deep), CARD)[0])
    assert torch.equal(backward(model, ids), backward(plain, ids))
    pairs = zip(trainable_parameters(model), trainable_parameters(plain), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    gc.collect()
    assert offload.held == 0 and card.memory.pinned == 0 and not card.memory.faults
    assert waited(card, model, ids) == waited(card, plain, ids)


def runs_out(model: Any, ids: torch.Tensor) -> bool:
    try:
        backward(model, ids)
    except torch.OutOfMemoryError:
        # The CPU's queue keeps what was not computed until the next backward pass; the thread of a card drops it.
        torch.ones((), requires_grad=True).backward()
        return True
    return False


def test_out_of_memory_anywhere_leaves_no_boundary(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    model, offload = offloaded(deep)
    backward(model, ids)
    model.zero_grad()
    before, first = card.memory.allocated, card.memory.allocations
    backward(model, ids)
    model.zero_grad()
    needed = card.memory.allocations - first
    for place in range(1, needed, max(1, needed // 7)):
        card.memory.fail_at = card.memory.allocations + place
        assert runs_out(model, ids)
        model.zero_grad()
        gc.collect()
        assert (place, offload.held, card.memory.pinned, card.memory.allocated) == (place, 0, 0, before)


def test_pinned_memory_that_runs_out_is_not_the_cards(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    """Halving the micro-batch would not help, and the card's message would make a run try it."""
    card.memory.pinned_limit = 0
    model, _ = offloaded(deep)
    with pytest.raises(qrosa.errors.DoesNotFitError, match="pinned host memory"):
        backward(model, ids)
    with pytest.raises(qrosa.errors.DoesNotFitError, match="pinned host memory"):
        pool.HostPool(pinned=True).take(100)


def test_closing_waits_for_the_copy_under_way(card: StandIn, deep: Path, ids: torch.Tensor) -> None:
    model = load_base(str(deep), CARD)[0]
    from qrosa.offload.packing import to_host

    host = pool.HostPool(pinned=True)
    flats = {path: to_host(layer.weight, host) for path, layer in quantized_linears(model).items()}
    stream = BaseStream(ready(model), flats, CARD, 0)
    backward(model, ids)
    stream.close()
    assert "synchronising a stream" in card.waits and not card.memory.faults
