"""Whole runs on the stand-in card: what a first card would have met in its first minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qrosa.base.shape_source import read_shape
from qrosa.measure.probe import probe
from qrosa.ops.determinism import deterministic
from qrosa.planner.hardware import Here
from qrosa.planner.request import make_request
from qrosa.planner.search.solve import solve
from qrosa.train.run import finetune
from tests.card.standin.device import StandIn
from tests.card.standin.memory import CONTEXT
from tests.card.test_first_card import Settings, losses

GB = 1 << 30


def test_the_cap_counts_the_context(card: StandIn, settings: Settings) -> None:
    """--vram 4GB on a card of 8: torch gets what the driver's context leaves of the 4, and all again afterwards."""
    report = finetune(settings(eval_split="25%"))
    assert report["steps"] == 4
    assert card.memory.lowest_fraction * 8 * GB == pytest.approx(4 * GB - CONTEXT, rel=1e-6)
    assert card.memory.fraction == 1.0
    assert report["memory"]["overhead"]["context"] == CONTEXT


def test_a_cap_above_what_is_free_promises_nothing(make_card: Callable[..., StandIn], settings: Settings) -> None:
    card = make_card(total=8 * GB, others=5 * GB)  # a desktop, or another run
    finetune(settings())
    assert card.memory.lowest_fraction * 8 * GB == pytest.approx(3 * GB - CONTEXT, rel=1e-6)


@pytest.mark.parametrize("score", ["repair", "residual"])
def test_scores_that_read_the_quantisation_error_of_a_streamed_base(
    card: StandIn, settings: Settings, score: str
) -> None:
    """The packed weights lie in host memory and the statistics on the card: one product needs both."""
    assert finetune(settings(offload="base", mask_score=score))["steps"] == 4


def test_determinism_can_be_had_off_and_the_report_says_so(card: StandIn, settings: Settings, tmp_path: Path) -> None:
    report = finetune(settings(deterministic="off"))
    assert report["deterministic"] is False
    finetune(settings(deterministic="off", output=str(tmp_path / "again")))
    assert losses(tmp_path / "run") != losses(tmp_path / "again")
    assert not torch.are_deterministic_algorithms_enabled()


def test_generation_stays_outside_of_determinism(card: StandIn, settings: Settings) -> None:
    """Sampling by top-p sums floats one after the other, which strict determinism refuses on a card."""
    report = finetune(settings())
    assert report["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
    torch.rand(4, device="cuda").cumsum(0)


@pytest.mark.parametrize("strict", [True, False])
def test_attention_is_by_the_kernels_that_are_planned_for(card: StandIn, strict: bool) -> None:
    """torch prefers cuDNN's on some cards, which determinism keeps out and its absence would let in."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with deterministic(strict):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_probing(card: StandIn, settings: Settings) -> None:
    config = settings(offload="activations,base", seq_len=32)
    here = Here(8 * GB, 16 * GB, card_free=8 * GB)
    made = solve(make_request(read_shape(config.model), config.groups, here, vram=4 * GB, device="cuda"))
    found = probe(config.model, made)
    assert found.fits and found.overhead is not None and found.overhead.context == CONTEXT
    assert found.peak > CONTEXT
    assert card.memory.lowest_fraction * 8 * GB == pytest.approx(4 * GB - CONTEXT, rel=1e-6)
