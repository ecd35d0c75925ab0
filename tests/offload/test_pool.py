"""Chunks of host memory: pieces that do not overlap, and as little waste as the plan counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.real_models import MODELS
from qrosa.base.shape import from_config
from qrosa.offload import pool
from qrosa.offload.packing import flat_layout
from qrosa.offload.pool import HostPool
from qrosa.planner.bytes import components as parts
from qrosa.quant.nf4 import NF4Weight


@given(st.lists(st.integers(0, 5000), max_size=40))
def test_pieces_are_whole_and_apart(sizes: list[int]) -> None:
    made = HostPool(pinned=False, chunk=4096)
    pieces = [made.take(size) for size in sizes]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    for value, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.numel() == size and bool((piece == value).all())
    assert all(chunk.numel() & (chunk.numel() - 1) == 0 for chunk in made._chunks)
    assert made.nbytes >= sum(sizes)


def test_what_is_left_at_an_end_is_used() -> None:
    made = HostPool(pinned=False, chunk=1024)
    for size in (700, 700, 300, 300):
        made.take(size)
    assert made.nbytes == 2048


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-14B"])
def test_the_plan_counts_the_same_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = from_config(name, MODELS[name].config)
    weights = [NF4Weight.meta((linear.out_features, linear.in_features)) for linear in shape.linears]
    sizes = [flat_layout(weight)[1] for weight in weights]
    byte = torch.zeros(1, dtype=torch.uint8)
    monkeypatch.setattr(pool.torch, "empty", lambda size, **_: byte.expand(size))
    made = HostPool(pinned=False)
    for size in sizes:
        made.take(size)
    assert parts.pinned_base_bytes(shape) == made.nbytes < 1.1 * parts.base_bytes(shape)
