"""What ranks the positions of a mask: one entry a score, and everything that depends on which one it is.

W is a weight matrix with quantisation error R = W - deq(Wq), g the gradient of one sample's mean loss. A score is made
of a *statistic*, the sum over samples of g or of g^2 (counts of samples cancel in a ranking, so sums stand for means),
and of R, element by element. The settings' choices and help, the plan's bytes and selection itself read this table;
to add a score, add its entry. Torch-free, so that settings and plan can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MaskScore:
    """One way to rank positions.

    Attributes:
        name: As ``--mask-score`` takes it.
        words: What it is, for the flag's help.
        statistic: What is summed over samples: ``squares`` of gradients, ``sums`` of gradients, or nothing.
        reads_error: R is read, so 16-bit weights must be there.
        rank: ``rank(statistic, error)`` -> scores, not negative, from tensors of one shape; what the score does not
            read is None. It may overwrite the error, not the statistic. None where positions are drawn.
        scratch: Dense fp32 matrices beside the statistic while a matrix is ranked and its best are picked.
    """

    name: str
    words: str
    statistic: Literal["squares", "sums"] | None = None
    reads_error: bool = False
    rank: Callable[[Any, Any], Any] | None = None
    scratch: int = 0

    @property
    def reads_gradients(self) -> bool:
        """Rows must pass through the model."""
        return self.statistic is not None

    @property
    def squares(self) -> bool:
        """Each sample's gradient is squared before it is added."""
        return self.statistic == "squares"


_TABLE = (
    # The diagonal of the empirical Fisher; the paper's score (RoSA, arXiv 2401.04679).
    MaskScore("squared", "mean squared gradient", "squares", rank=lambda statistic, _: statistic),
    MaskScore("mean", "size of the mean gradient", "sums", rank=lambda statistic, _: statistic.abs(), scratch=1),
    # What taking one error back is worth, to first order.
    MaskScore(
        "repair",
        "that times the size of the quantisation error",
        "sums",
        reads_error=True,
        scratch=1,
        rank=lambda statistic, error: error.mul_(statistic).abs_(),
    ),
    # The same to second order: the saliency of Optimal Brain Damage (LeCun et al., 1989) with the Fisher's diagonal.
    MaskScore(
        "curvature",
        "squared error times mean squared gradient",
        "squares",
        reads_error=True,
        scratch=1,
        rank=lambda statistic, error: error.square_().mul_(statistic),
    ),
    MaskScore("residual", "size of the error alone", reads_error=True, scratch=1, rank=lambda _, error: error.abs_()),
    MaskScore("random", "nothing, the control that every claim about masks has to beat"),
)

MASK_SCORES = {score.name: score for score in _TABLE}


def describe_scores() -> str:
    """The scores in words: ``mean squared gradient (squared), ...``."""
    *most, last = (f"{score.words} ({score.name})" for score in _TABLE)
    return f"{', '.join(most)}, or {last}"
