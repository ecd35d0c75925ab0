"""The outer step of machines that trained apart: how their moves become one.

As in EDiT (arXiv 2412.07210), which took the step from DiLoCo (arXiv 2311.08105).

Each machine starts from the common values, takes steps of its own and comes back with a *move*, its values less the
common ones. The moves of one flat part become one:

    weights   a machine whose move is far longer than moves have been, or is not finite, does not count;
              the others by softmax(-norm / mean norm)
    clipping  the weighted mean is scaled down to a bound that follows the moves so far
    step      Nesterov's: velocity = momentum * velocity + mean;  values += lr * (mean + momentum * velocity)

Where no machine counts, all go back to the common values. What is usual is known by a running mean and variance of the
norms, which is the same on every machine, as everything here is: it is computed from what all were told.

Two changes from EDiT. Its softmax takes plain norms, whose scale grows with the number of parameters: with millions of
them one machine would get all the weight, so norms are divided by their mean. Its threshold is a number of standard
deviations, which are next to nothing where machines do alike work: no less than a fifth of the mean is taken for one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrosa.errors import StorageError

FIRST_MEETINGS = 5  # in which nothing is usual yet, so nothing stands out
_THRESHOLD = 3.0  # standard deviations above the mean
_LEAST_DEVIATION = 0.2  # of the mean
_MOST = 1.5  # times the mean: where a mean move is clipped
_RENEWAL = 0.1  # least weight of a meeting in the running figures


@dataclass
class UsualNorms:
    """Running figures of the norms of the moves that counted.

    Attributes:
        mean: Of the norms.
        variance: Of the norms around that.
        meetings: How many they are of.
    """

    mean: float = 0.0
    variance: float = 0.0
    meetings: int = 0

    @property
    def known(self) -> bool:
        """Enough meetings to tell what stands out."""
        return self.meetings >= FIRST_MEETINGS

    @property
    def most(self) -> float:
        """The norm that a mean move is scaled down to."""
        return _MOST * self.mean if self.known else math.inf

    def stands_out(self, norm: float) -> bool:
        """Whether a move of this norm is not finite or far longer than usual."""
        if not math.isfinite(norm):
            return True
        deviation = max(math.sqrt(self.variance), _LEAST_DEVIATION * self.mean)
        return self.known and norm > self.mean + _THRESHOLD * deviation

    def after(self, norms: Sequence[float]) -> UsualNorms:
        """The figures with one more meeting's.

        Args:
            norms: Of all machines' moves. Where all stand out, all that are finite are taken: what they agree on is
                the new usual, and later meetings do not go back for ever.
        """
        taken = [norm for norm in norms if not self.stands_out(norm)] or [norm for norm in norms if math.isfinite(norm)]
        if not taken:
            return self
        share = max(_RENEWAL, 1 / (self.meetings + 1))
        center = self.mean if self.meetings else sum(taken) / len(taken)
        spread = sum((norm - center) ** 2 for norm in taken) / len(taken)
        return UsualNorms(
            self.mean + share * (sum(taken) / len(taken) - self.mean),
            self.variance + share * (spread - self.variance),
            self.meetings + 1,
        )


def move_weights(norms: Sequence[float], usual: UsualNorms) -> list[float]:
    """How much each machine's move counts: weights that add up to 1, or zeros where every one stands out.

    Args:
        norms: Of the moves, one a machine.
        usual: What norms have been.
    """
    counting = [norm for norm in norms if not usual.stands_out(norm)]
    mean = sum(counting) / max(1, len(counting))
    scores = [0.0 if usual.stands_out(norm) else math.exp(-norm / mean) if mean else 1.0 for norm in norms]
    total = sum(scores)
    return [score / total if total else 0.0 for score in scores]


@torch.no_grad()
def clip_move(move: Tensor, most: float) -> float:
    """Scale a mean move down, in place, to a norm of ``most``; returns the norm before."""
    norm = float(torch.linalg.vector_norm(move, dtype=torch.float64))
    if norm > most:
        move.mul_(most / norm)
    return norm


class OuterPart:
    """The common values of one flat part and the velocity that they move with, fp32, in host memory.

    They are read once a meeting, and a card has better use for its memory.

    Args:
        values: Flat, the same on every machine; copied.
        lr: Outer learning rate; 1 with ``momentum`` 0 takes the weighted mean as it is.
        momentum: Of the outer step.
    """

    def __init__(self, values: Tensor, *, lr: float, momentum: float) -> None:
        self.values = values.detach().to("cpu", torch.float32, copy=True)
        self.velocity = torch.zeros_like(self.values)
        self.usual = UsualNorms()
        self.lr = lr
        self.momentum = momentum

    @torch.no_grad()
    def step(self, move: Tensor) -> None:
        """Take one outer step.

        Args:
            move: The weighted mean of the machines' moves, on the host; changed in place where it is clipped.
        """
        clip_move(move, self.usual.most)
        self.velocity.mul_(self.momentum).add_(move)
        self.values.add_(move, alpha=self.lr).add_(self.velocity, alpha=self.lr * self.momentum)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the values, which are the optimizer's masters after a meeting."""
        usual = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in dataclasses.asdict(self.usual).items()
        }
        return {"velocity": self.velocity.clone(), **usual}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back ``state_tensors``' answer, bit for bit.

        Raises:
            StorageError: Tensors are missing or of another size.
        """
        names = [field.name for field in dataclasses.fields(UsualNorms)]
        velocity = tensors.get("velocity")
        if velocity is None or velocity.shape != self.velocity.shape or not tensors.keys() >= set(names):
            raise StorageError("the outer step's state does not match the adapter", "resume from another checkpoint")
        self.velocity.copy_(velocity)
        mean, variance, meetings = (float(tensors[name]) for name in names)
        self.usual = UsualNorms(mean, variance, int(meetings))
