"""The table of objectives: losses as TRL computes them from the same numbers, and slopes where they are extreme."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qrosa.config import TrainConfig
from qrosa.eval.objectives import OBJECTIVES, Scores, describe_objectives
from qrosa.eval.preferences import mean_drift, slopes


def scores(
    policy: list[float], reference: list[float] | None = None, tokens: float = 1.0, drift: float = 0.0
) -> Scores:
    numbers = torch.tensor([policy, reference or [0.0] * len(policy)], dtype=torch.float64)
    count = torch.full((len(policy),), tokens, dtype=torch.float64)
    return Scores(numbers[0], numbers[1], count, torch.arange(len(policy)) % 2 == 0, drift)


def test_odds_ratios_are_trl_s() -> None:
    pytest.importorskip("trl", reason="the oracle is TRL's ORPOTrainer")
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = -torch.rand(50, dtype=torch.float64) * 8 - 0.01, -torch.rand(50, dtype=torch.float64) * 8 - 0.01
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    made = scores(torch.stack((chosen, rejected), dim=1).flatten().mul(7).tolist(), tokens=7.0)
    losses, _ = OBJECTIVES["orpo"].loss(made, TrainConfig(beta=0.25))
    assert torch.allclose(losses, (-chosen - theirs).double(), rtol=1e-5)


@pytest.mark.parametrize("objective", [name for name, goal in OBJECTIVES.items() if goal.compares])
def test_slopes_are_those_of_the_losses(objective: str) -> None:
    """By differences, and finite where the model is certain of an answer, or far from its base."""
    goal, weights, width = OBJECTIVES[objective], TrainConfig(beta=0.3, undesirable_weight=2.0), 1e-6
    made = scores([-3.0, -5.0, -1.0, -0.5], [-4.0, -3.0, -1.5, -2.0], tokens=2.0, drift=0.2)
    _, found = slopes(goal, made, weights)
    for place in range(4):
        shifted = [made.policy.clone() for _ in range(2)]
        shifted[0][place] -= width
        shifted[1][place] += width
        up, down = (
            goal.loss(Scores(policy, made.reference, made.tokens, made.wanted, made.drift), weights)[0].sum()
            for policy in shifted
        )  # the loss by cross-entropy: up is the lower log-probability
        assert float(found[place]) == pytest.approx(float(up - down) / (2 * width), rel=1e-5, abs=1e-9)
    for extreme in ([0.0, -1e4], [-1e4, 0.0], [0.0, 0.0]):
        losses, slope = slopes(goal, scores(extreme), weights)
        assert losses.isfinite().all() and slope.isfinite().all()


def test_where_training_starts() -> None:
    """At the base itself: dpo's loss is log 2, kto's a half of a row's weight, and both push answers apart."""
    same = scores([-3.0, -5.0], [-3.0, -5.0])
    for name, loss in (("dpo", [math.log(2)]), ("kto", [0.5, 0.5])):
        losses, slope = slopes(OBJECTIVES[name], same, TrainConfig())
        assert losses.tolist() == pytest.approx(loss) and slope[0] > 0 > slope[1]


def test_the_drift_is_not_below_zero() -> None:
    assert [mean_drift(*sums) for sums in ((6.0, 3.0), (-6.0, 3.0), (0.0, 0.0))] == [2.0, 0.0, 0.0]


def test_passes() -> None:
    assert {name: goal.passes for name, goal in OBJECTIVES.items()} == {"sft": 0, "dpo": 2, "orpo": 1, "kto": 4}
    assert all(f"({name})" in describe_objectives() for name in OBJECTIVES)
