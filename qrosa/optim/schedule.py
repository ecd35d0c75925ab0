"""When each phase runs, and how high the learning rates are: pure functions of the step.

    step   0 ........ warmup ........................ total
    phase  warm-up  | mask selection | joint training
    low-rank LR   rises over its own first steps, then decays to the end
    sparse LR                  rises from the selection on, over as many steps, times the same decay

The sparse part is born in the middle of the run, with an optimizer that has seen no gradient yet. Handing it
the full rate at once would let Adam's first, badly scaled steps undo what the mask was chosen for, so its rate
has a warm-up of its own that begins at the selection. Both parts share one decay, so they end together.

Steps count from 0; ``total`` steps run. No step has a rate of zero: the first has ``1 / warm-up`` of the
full rate and the last has one decay unit left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qrosa.config import RunConfig, TrainConfig

MOST_WARMUP_STEPS = 64


@dataclass(frozen=True)
class Phases:
    """Length of the phases in optimizer steps.

    Attributes:
        warmup: Low-rank-only steps before the masks are picked; 0 where nothing is to be picked or nothing
            low-rank is there to train.
        total: All optimizer steps.
        sparse: Whether there is a sparse part, hence a mask selection after ``warmup`` steps.
    """

    warmup: int
    total: int
    sparse: bool

    def phase(self, step: int) -> str:
        """The phase that step ``step`` (from 0) belongs to."""
        return "warmup" if self.sparse and step < self.warmup else "train"


def warmup_and_total(config: RunConfig, n_rows: int, *, low_rank: bool = True, sparse: bool = True) -> Phases:
    """The phases of a run over ``n_rows`` training rows.

    Args:
        config: ``max_steps`` or ``epochs``, ``batch_size`` and ``warmup_steps`` are read.
        n_rows: Training rows.
        low_rank: Whether any low-rank parameter is trained.
        sparse: Whether any sparse parameter is trained.
    """
    total = steps_of(config.train, n_rows)
    return phases_of(total, config.masks.warmup_steps, low_rank=low_rank, sparse=sparse)


def steps_of(train: TrainConfig, n_rows: int) -> int:
    """Optimizer steps of ``max_steps``, or of ``epochs`` over ``n_rows`` training rows."""
    if train.max_steps is not None:
        return train.max_steps
    epochs = 1.0 if train.epochs is None else train.epochs
    return max(1, math.ceil(epochs * n_rows / train.batch_size - 1e-9))


def steps_between_evaluations(train: TrainConfig, total: int) -> int | None:
    """Steps from one evaluation to the next, or None for one at the end of ``total`` steps only."""
    judged = train.keep_best or train.stop_after is not None
    return train.eval_every or (max(1, total // 20) if judged else None)


def steps_between_saves(train: TrainConfig, total: int) -> int:
    """Steps from one checkpoint to the next; where machines step on their own, one at each of their meetings."""
    return train.save_every or (train.sync_every if train.sync_every > 1 else max(1, total // 10))


def phases_of(total: int, warmup_steps: int | None, *, low_rank: bool, sparse: bool) -> Phases:
    """The phases of ``total`` steps.

    Args:
        total: All optimizer steps.
        warmup_steps: Low-rank-only steps; None for a tenth of all, at most ``MOST_WARMUP_STEPS``.
        low_rank: Whether any low-rank parameter is trained.
        sparse: Whether any sparse parameter is trained.
    """
    if not (low_rank and sparse):
        return Phases(warmup=0, total=total, sparse=sparse)
    warmup = min(MOST_WARMUP_STEPS, total // 10) if warmup_steps is None else warmup_steps
    return Phases(warmup=min(warmup, total - 1), total=total, sparse=True)


def ramp_steps(total: int, warmup_share: float) -> int:
    """Steps over which a learning rate rises to its full height."""
    return math.ceil(total * warmup_share - 1e-9)


def learning_rate_factor(step: int, total: int, kind: str, warmup_share: float) -> float:
    """Factor on the low-rank learning rate at ``step`` (from 0): a linear rise, then the decay ``kind``."""
    ramp = ramp_steps(total, warmup_share)
    if step < ramp:
        return (step + 1) / (ramp + 1)
    done = (step - ramp) / max(1, total - ramp)
    if kind == "linear":
        return max(0.0, 1.0 - done)
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def sparse_learning_rate_factor(step: int, total: int, kind: str, warmup_share: float, selected_at: int) -> float:
    """Factor on the sparse learning rate: the shared factor times a rise that starts at the selection.

    A selection before the first step leaves the shared rise alone, instead of applying it twice.
    """
    rise = sparse_rise(step, ramp_steps(total, warmup_share), selected_at)
    return learning_rate_factor(step, total, kind, warmup_share) * rise


def sparse_rise(step: int, ramp: int, selected_at: int) -> float:
    """The sparse part's own rise over ``ramp`` steps from its selection on; 1.0 after it, and without one."""
    if selected_at == 0 or step - selected_at >= ramp:
        return 1.0
    return max(0, step - selected_at + 1) / (ramp + 1)
