"""What quantising a model will take, before anything is loaded: bytes by component, operations, and seconds.

For a named card the seconds follow from its data sheet. For the CPU that is here they follow from what it does in a
second: products of its own are timed, and the rounding of a small matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qrosa.adapters.budget import allocate
from qrosa.base.shape import ModelShape
from qrosa.base.shape_source import read_shape
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.config import make_groups
from qrosa.planner.bytes.calibration import calibration_bytes
from qrosa.planner.bytes.phases import weighing_bytes
from qrosa.planner.cards import Card
from qrosa.planner.hardware import Here
from qrosa.planner.request import make_request
from qrosa.planner.search.candidates import candidates
from qrosa.planner.time.calibration_cost import Calibration, calibration_cost

_SIDE = 512  # of the matrices that are timed
_REPEATS = 3
# Of the rate of a product alone, what whole passes reach on a CPU: norms, attention, decoding and drawing tokens take
# the rest. Measured on SmolLM2-135M, and less than larger models will reach.
_PASS_SHARE = 0.3


@dataclass(frozen=True)
class Planned:
    """A quantisation before it runs.

    Attributes:
        shape: The base.
        bytes: On the device at the peak of the pass over the blocks, by component, and their ``total``.
        weighing: On the device at the peak of the pass before, on the 4-bit model, that weighs tokens.
        cost: Operations and columns.
    """

    shape: ModelShape
    bytes: dict[str, int]
    weighing: int
    cost: Calibration

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.bytes["total"], self.weighing)

    def to_json(self, seconds: float | None = None) -> dict[str, Any]:
        """For a report or a program."""
        made = {
            "bytes": self.bytes,
            "weighing": self.weighing,
            "peak": self.peak,
            "operations": self.cost.operations,
            "columns": self.cost.columns,
        }
        return made | ({} if seconds is None else {"seconds": seconds})

    def seconds_on(self, card: Card) -> float:
        """Estimated for a card."""
        return self.cost.seconds(card)

    def seconds_here(self) -> float:
        """Estimated for this machine's CPU, which works for some tenths of a second to tell."""
        rounded, single, double, value = _rates()
        values = sum(linear.size for linear in self.shape.linears)
        cost = self.cost
        passes = (cost.passed + cost.moments) / (_PASS_SHARE * rounded)
        return passes + cost.single / single + cost.double / double + value * values


def plan(config: QuantizeConfig, *, on_card: bool) -> Planned:
    """Count what a quantisation will take.

    Raises:
        InputError: No model, or one whose shape cannot be read.
    """
    shape = read_shape(config.model)
    size = calibration_bytes(
        shape,
        config.rows,
        config.length,
        config.micro_batch,
        sparse=config.density > 0,
        low_rank=config.rank > 0,
        on_card=on_card,
    )
    # A budget and the rest of a run's settings change nothing here: the model is weighed bare.
    groups = make_groups({"density": "1%", "seq_len": config.length, "base_rounding": "feedback"})
    request = make_request(shape, groups, Here(None, 1 << 62), device="cuda" if on_card else "cpu")
    work = next(candidates(request, allocate(groups.adapter, shape.linears, shape.base_parameters)))
    weighing = weighing_bytes(work, config.length)
    return Planned(shape, size, weighing, calibration_cost(shape, config.rows, config.length))


def _rates() -> tuple[float, float, float, float]:
    """Operations a second in products as the pass takes them, in fp32 and in fp64; the seconds that a value takes to be
    rounded, the search for its maximum included.
    """
    import torch

    from qrosa.base.blocks import rounded_products
    from qrosa.quant.feedback import round_with_feedback
    from qrosa.quant.hessian import factor
    from qrosa.quant.maxima import search_maxima

    weight = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    twice = weight.double()
    factored = factor(torch.eye(_SIDE))

    def rounding() -> None:
        maxima = search_maxima(weight, factored.worth())
        round_with_feedback(weight, maxima.expand(), factored)

    operations = 2 * _SIDE**3
    with rounded_products():
        passing = _least(lambda: weight @ weight)
    single, double, rounded = (_least(work) for work in (lambda: weight @ weight, lambda: twice @ twice, rounding))
    return operations / passing, operations / single, operations / double, rounded / weight.numel()


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    work()
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
