"""Learning rates by rule, where none are given: a pure function of the model's width, alpha and the number of steps.

What is known are two points. RoSA's own code trains a 7B model (width 4096, alpha 16, some 230 steps) at 7e-4 for the
low-rank part and 2e-4 for the sparse one. A model of width 576 did best over some 75 to 125 steps at 2e-3 to 6e-3 and
about 1e-3 (``bench/accuracy``). The rule goes through both:

- *width*: with A drawn as LoRA draws it, a step of Adam on B changes the output by the same amount whatever the width,
  and a step on A by an amount that grows with it; one rate for both must then fall with the square root of the width
  (LoRA+, arXiv 2402.12354). A row's sparse values act on as many inputs as the density gives it, and follow alike.
- *rank*: left out. The product is scaled by alpha / rank, and a step changes all ranks, so the ranks cancel.
- *alpha*: the low-rank rate is divided by it, the sparse one is not.
- *steps*: with the inverse square root, from half to double the rate of 256 steps: short runs need larger steps to get
  anywhere, and long ones are not slowed down without bound.

- *preferences*: a tenth. What pulls answers apart has no end of its own, and published settings for low-rank adapters
  lie an order below those for answers; this is a start, nothing here has measured it.

A rate that is given is taken as it is, and the other follows from it in the rule's proportion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTH, STEPS, ALPHA = 4096, 256, 16.0
LOW_RANK_RATE = 7e-4
SPARSE_SHARE = 2 / 7
"""The sparse rate over the low-rank one, at ``ALPHA``."""
PREFERENCE_SHARE = 0.1
"""The rate for preferences over that for answers."""
MOST = 2.0
"""Factor that the number of steps makes at most."""


@dataclass(frozen=True)
class Rates:
    """Learning rates, and why they are what they are.

    Attributes:
        low_rank: Of the low-rank part.
        sparse: Of the sparse part.
        reason: One line for people; empty where both were given.
    """

    low_rank: float
    sparse: float
    reason: str


def choose_rates(
    *,
    width: int,
    alpha: float = ALPHA,
    steps: int | None = None,
    low_rank: float | None = None,
    sparse: float | None = None,
    preferences: bool = False,
) -> Rates:
    """Both learning rates.

    Args:
        width: The model's hidden size.
        alpha: Scale of the low-rank part.
        steps: Optimizer steps of the whole run; None where they are not known, which counts as ``STEPS``.
        low_rank: The low-rank part's rate, if it is given.
        sparse: The sparse part's rate, if it is given.
        preferences: What is learnt is which of two answers is preferred.
    """
    told = [f"width {width}", f"alpha {alpha:g}", *([] if steps is None else [f"{steps} steps"])]
    share = SPARSE_SHARE * alpha / ALPHA
    if low_rank is not None and sparse is not None:
        return Rates(low_rank, sparse, "")
    if low_rank is not None:
        chosen = _rounded(low_rank * share)
        return Rates(low_rank, chosen, f"learning rate by rule: {chosen:g} sparse, from {low_rank:g} low-rank")
    if sparse is not None:
        chosen = _rounded(sparse / share)
        return Rates(chosen, sparse, f"learning rate by rule: {chosen:g} low-rank, from {sparse:g} sparse")
    length = 1.0 if steps is None else min(MOST, max(1 / MOST, math.sqrt(STEPS / steps)))
    told += ["preferences"] if preferences else []
    rate = (
        (PREFERENCE_SHARE if preferences else 1.0) * LOW_RANK_RATE * math.sqrt(WIDTH / width) * length * ALPHA / alpha
    )
    found = Rates(_rounded(rate), _rounded(rate * share), "")
    reason = f"learning rates by rule: {found.low_rank:g} low-rank, {found.sparse:g} sparse ({', '.join(told)})"
    return Rates(found.low_rank, found.sparse, reason)


def _rounded(rate: float) -> float:
    """Two digits: the rule is no more exact than that."""
    return float(f"{rate:.2g}")
