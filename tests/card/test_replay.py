"""The model of torch's allocator, and an 8B model's run through it: reserved memory stays within the plan."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.allocator import Expandable, Segments
from bench.replay import CASES, GB, PHASES, config, planned, requests, reserved, room

MIB = 1 << 20


@pytest.mark.parametrize(("size", "reserved"), [(1, 2), (1 * MIB, 2), (2 * MIB, 20), (9 * MIB, 20), (11 * MIB, 12)])
def test_segments_have_torchs_sizes(size: int, reserved: int) -> None:
    allocator = Segments()
    allocator.take(size)
    assert allocator.reserved == reserved * MIB


def test_a_hole_between_two_blocks_is_lost_to_a_larger_one() -> None:
    """Where segments are fixed; one that can grow takes less."""
    found = {}
    for kind in (Segments, Expandable):
        allocator = kind()
        first, second = allocator.take(60 * MIB), allocator.take(60 * MIB)
        allocator.give(first)
        allocator.take(70 * MIB)
        allocator.give(second)
        allocator.take(100 * MIB)
        found[kind] = allocator.reserved
    assert found[Segments] == 290 * MIB and found[Expandable] < 250 * MIB


@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 7)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_what_is_given_back_is_whole_again(steps: list[tuple[int, int]]) -> None:
    """In use never overlaps, everything adds up, and once all is given back the cache can be emptied."""
    for kind in (Segments, Expandable):
        allocator, live = kind(), []
        for size, victim in steps:
            live.append(allocator.take(size))
            assert live[-1].size >= size
            if victim < len(live) - 1:
                allocator.give(live.pop(victim))
            spans = sorted((block.start, block.start + block.size) for block in live)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            assert sum(block.size for block in live) == allocator.allocated <= allocator.reserved <= allocator.peak
        for block in live:
            allocator.give(block)
        assert allocator.allocated == 0
        allocator.empty_cache()
        assert allocator.reserved == 0


@pytest.mark.parametrize(("vram", "length", "checkpointing"), CASES)
def test_an_8b_run_reserves_no_more_than_planned(vram: int, length: int, checkpointing: str) -> None:
    """Warm-up, selection and training on rows of many lengths, phase by phase; both kinds give all of it back."""
    plan = planned(vram * GB, length, checkpointing=checkpointing)
    phases, most = requests(plan, config()), room(plan)
    expandable, segments = Expandable(), Segments()
    found = reserved(phases, expandable)
    for name, size, granted in zip(PHASES, found, most, strict=True):
        assert size <= granted, name
    # Not idle, either: the fullest phase needs what is planned, and fixed segments need more of it.
    assert max(found) > 0.93 * max(most)
    assert max(found) <= max(reserved(phases, segments)) <= 1.1 * max(most)
    lasting = {key for phase in phases for key, size in phase if size >= 0}
    lasting -= {key for phase in phases for key, size in phase if size < 0}
    kept = sum(size for phase in phases for key, size in phase if key in lasting)
    resident = plan.phases["train"].device
    named = ("base", "unquantised", "adapter", "gradients", "optimizer", "cublas_workspace")
    assert kept == pytest.approx(sum(resident[name] for name in named), rel=0.02)
