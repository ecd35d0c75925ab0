"""The heap is given back before what comes would go over the bound, once for each stretch of growth, and only then."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from qrosa import heap
from qrosa.adapters.linear import QRosaLinear
from qrosa.model.heap import look_at_layers

MIB = 2**20


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the process has in memory, as the test says; giving back takes it down to ``live``."""
    state = {"now": 0, "live": 0, "given": 0}

    def give_back() -> None:
        state["given"] += 1
        state["now"] = state["live"]

    monkeypatch.setattr(heap, "resident_now", lambda: state["now"])
    monkeypatch.setattr(heap, "give_back", give_back)
    return state


@pytest.mark.parametrize(("now", "coming", "given"), [(79, None, 0), (80, None, 1), (89, 10, 0), (89, 11, 1)])
def test_it_is_given_back_when_what_comes_would_go_over(
    resident: dict[str, int], now: int, coming: int | None, given: int
) -> None:
    with heap.within(100, coming=20, kept=8):
        resident.update(now=now, live=50)
        heap.look(coming)
        assert resident["given"] == given
    heap.look(1000)
    assert resident["given"] == given and not heap.bounded()  # no bound, no look


def test_what_is_in_use_is_not_asked_for_over_and_over(resident: dict[str, int]) -> None:
    """Above the bound with nothing to give: asked again only after some growth, or when it has been below."""
    with heap.within(100, kept=40):
        resident.update(now=120, live=120)
        for _ in range(3):
            heap.look()
        assert resident["given"] == 1
        resident.update(now=126)
        heap.look()
        assert resident["given"] == 2
        resident.update(now=60)
        heap.look()
        resident.update(now=105)
        heap.look()
        assert resident["given"] == 3


def test_growth_between_two_times_has_room(resident: dict[str, int]) -> None:
    """Free memory grows by a byte a look, beside 60 in use and 20 that come: never over the bound."""
    with heap.within(100, coming=20, kept=16):
        resident.update(now=60, live=60)
        for look in range(200):
            heap.look(20 if look % 3 else 25)  # what comes differs from look to look
            resident["now"] += 1
            assert resident["now"] + 20 <= 100
    assert 0 < resident["given"] <= 20


def test_bounds_nest_and_end_with_their_block(resident: dict[str, int]) -> None:
    with pytest.raises(ValueError), heap.within(100), heap.within(None), heap.within(50):
        resident.update(now=60)
        heap.look()
        assert resident["given"] == 1
        raise ValueError
    assert not heap.bounded()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from Linux's /proc")
def test_a_real_heap_gives_back_what_is_free() -> None:
    """Blocks below the size that is mapped by itself, every other one freed: nobody would get them back otherwise."""
    blocks = [torch.ones(64 * 1024) for _ in range(800)]  # 200 MiB in pieces of 256 KiB
    full = heap.resident_now()
    with heap.within(full + MIB, coming=0, kept=MIB):
        del blocks[::2]
        before = heap.resident_now()
        heap.look(coming=32 * MIB)
        after = heap.resident_now()
    assert before - after > 60 * MIB or before < full - 60 * MIB  # by the look, or by another C library at once
    assert len(blocks) == 400


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_looked_at_forward_back_and_again(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    looks: list[int | None] = []
    monkeypatch.setattr("qrosa.model.heap.look", lambda coming=None: looks.append(coming))
    model = nn.Sequential(*(QRosaLinear.from_linear(nn.Linear(64, 64, bias=False), rank=2) for _ in range(2)))
    look_at_layers(model)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with heap.within(1 << 50):
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        assert len(looks) == 2
        y.float().sum().backward()
    # On the way back each input's gradient; recomputed layers are looked at again before that, and their inputs twice.
    assert len(looks) == (4 if not recompute else 2 + 2 + 3)


def test_chunks_of_logits_say_how_much_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    from qrosa.train.loss import chunked_loss

    seen: list[int | None] = []
    monkeypatch.setattr("qrosa.train.loss.look", seen.append)
    head = nn.Linear(8, 100, bias=False).requires_grad_(False)
    chunked_loss(torch.randn(10, 8, requires_grad=True), torch.zeros(10, dtype=torch.int64), head, chunk_tokens=4)
    assert seen == [8 * 4 * 100] * 3


def test_progress_is_told_after_a_look(resident: dict[str, int]) -> None:
    told = []
    with heap.within(100):
        resident.update(now=200, live=10)
        heap.look_at_each(lambda done, of: told.append((done, of, resident["given"])))(1, 2)
    assert told == [(1, 2, 1)]
