"""The figures of the benchmark of quantisation, on losses made up for it."""

from __future__ import annotations

import pytest
import torch

from bench.bench_quantize import STRETCH, won_back


def test_the_share_won_back_and_its_error() -> None:
    original = torch.zeros(40, STRETCH)
    nearest = torch.ones(40, STRETCH)
    halfway = {"a": original + 0.5}
    assert won_back({"a": original}, {"a": nearest}, halfway, "a") == {"share": 0.5, "error": 0.0}
    noisy = {"a": 0.5 + torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).expand(40, STRETCH)}
    found = won_back({"a": original}, {"a": nearest}, noisy, "a")
    # Stretches of independent noise of standard deviation 1 against a cost of 1 each: the error of a mean of 40.
    assert found["error"] == pytest.approx(40**-0.5, rel=0.2)
