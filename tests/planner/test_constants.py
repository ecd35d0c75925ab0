"""Sizes that the planner states for itself, to stay torch-free, are those of the code that takes the memory."""

from __future__ import annotations

import pytest

from qrosa.export import verify
from qrosa.masks import repair
from qrosa.model import head
from qrosa.offload import packing, pool, streaming
from qrosa.optim.zero import engine
from qrosa.planner.bytes import components, inference, peaks, zero


@pytest.mark.parametrize(
    ("planned", "taken"),
    [
        (components._ALIGNMENT, packing.ALIGNMENT),
        (components.STREAM_SLOTS, streaming.SLOTS),
        (components._HOST_CHUNK, pool.CHUNK),
        (components._FULL_SVD, repair._FULL_SVD),
        (components._OVERSAMPLING, repair._OVERSAMPLING),
        (peaks.EVAL_CHUNK, head.CHUNK_TOKENS),
        (inference.VERIFY_ROWS, verify.VERIFY_ROWS),
        (zero.ALIGNED, engine._ALIGNED),
    ],
)
def test_the_plan_counts_what_the_code_takes(planned: int, taken: int) -> None:
    assert planned == taken
