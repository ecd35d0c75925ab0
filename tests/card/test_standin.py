"""The stand-in minds what a card minds, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.card.standin.device import StandIn
from tests.card.standin.timeline import RaceError


def pinned(size: int = 8) -> torch.Tensor:
    return torch.empty(size, pin_memory=True).fill_(2.0)


def test_tensors_say_where_they_are(card: StandIn) -> None:
    there = torch.zeros(4, device="cuda")
    assert there.device == torch.device("cuda", 0) and there.is_cuda
    assert (there + 1).is_cuda and not there.cpu().is_cuda and there.new_empty(3).is_cuda
    assert torch.nn.Parameter(there).is_cuda and torch.ones(4).to("cuda").is_cuda
    assert not torch.empty_like(there, device="cpu").is_cuda
    assert card.memory.allocated == 512 and card.memory.peak >= 1024


def test_two_devices_in_one_product_are_refused(card: StandIn) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, device="cuda") * torch.ones(4)
    assert (torch.ones(4, device="cuda") * torch.tensor(2.0)).sum().item() == 8  # a scalar may come from the host


def test_reading_before_the_copy_is_done(card: StandIn) -> None:
    side, there, host = torch.cuda.Stream(), torch.zeros(8, device="cuda"), pinned()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there.copy_(host, non_blocking=True)
        done = side.record_event()
    with pytest.raises(RaceError, match="reads before"):
        there.sum()
    torch.cuda.current_stream().wait_event(done)
    assert there.sum().item() == 16


def test_writing_over_what_is_still_read(card: StandIn) -> None:
    side, there, host = torch.cuda.Stream(), torch.ones(8, device="cuda"), pinned()
    there.sum()
    with torch.cuda.stream(side), pytest.raises(RaceError, match="writes over"):
        there.copy_(host, non_blocking=True)


def test_the_host_reads_what_a_copy_has_not_brought(card: StandIn) -> None:
    host = torch.empty(8, pin_memory=True)
    host.copy_(torch.ones(8, device="cuda"), non_blocking=True)
    with pytest.raises(RaceError, match="the host does not wait"):
        host.sum()
    torch.cuda.synchronize()
    assert host.sum() == 8


def test_memory_given_back_while_another_stream_uses_it(card: StandIn) -> None:
    side, there = torch.cuda.Stream(), torch.ones(8, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there.sum()
    del there
    assert "given back" in card.memory.faults.pop()
    there = torch.ones(8, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there.sum()
    there.record_stream(side)
    del there
    assert not card.memory.faults


def test_memory_that_nothing_was_written_to(card: StandIn) -> None:
    with pytest.raises(RaceError, match="nothing was written"):
        torch.empty(8, device="cuda").sum()
    torch.empty(0, device="cuda").sum()


def test_waits_are_counted(card: StandIn) -> None:
    there = torch.zeros(8, device="cuda")
    there.copy_(pinned(), non_blocking=True)
    assert not card.waits
    there.copy_(torch.ones(8), non_blocking=True)  # pageable memory
    there.sum().item()
    there.nonzero()
    assert len(card.waits) == 3


def test_the_cap_is_held(card: StandIn) -> None:
    torch.cuda.set_per_process_memory_fraction(0.5, 0)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(5 << 28, device="cuda", dtype=torch.float32)


def test_strict_determinism_refuses_what_a_card_refuses(card: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.ones(4, 4, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=False)
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
        there @ there
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    there @ there
    with pytest.raises(RuntimeError, match="deterministic implementation"):
        there.cumsum(0)
    torch.ones(4, 4).cumsum(0)
