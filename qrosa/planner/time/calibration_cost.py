"""What quantising with error feedback asks of a device, by count, and the seconds that this takes.

What tokens count, the pass of the windows over the 16-bit model, the second moments of the inputs, their factors, the
feedback and the figures of the report are products. Between them lies what no product does: a column is rounded at a
time, a few small operations each, and every block of 64 tries its maxima.

Not counted: reading the model from its disk, and what comes before the pass (rows that the model writes itself, the
choice of sparse positions) and after it (the losses).
"""

from __future__ import annotations

from dataclasses import dataclass

from qrosa.base.shape import ModelShape
from qrosa.planner.bytes.activations import FULL
from qrosa.planner.bytes.calibration import input_groups
from qrosa.planner.cards import A100, GEFORCE, HOPPER, Card
from qrosa.planner.time.cost import BANDWIDTH_SHARE, PRODUCT_SHARE

# Operations of a multiprocessor in a clock outside the tensor cores: fp32, fp64.
_PLAIN = {GEFORCE: (256, 4), A100: (128, 64), HOPPER: (256, 128)}
_LAUNCH = 5e-6  # seconds of a kernel that is too small to be seen
_LAUNCHES = 8  # of such kernels for a column: divide, find, store, look up, subtract, divide, store, feed back
_CANDIDATES = 14  # maxima that a block tries, of qrosa.quant.maxima
_SEARCHED = 10  # fp32 values read and written for a value and a candidate


@dataclass(frozen=True)
class Calibration:
    """What a model's quantisation asks for.

    Attributes:
        passed: Operations of the 16-bit model's pass, and of the pass forward and back that weighs tokens.
        moments: Operations of the second moments, whose operands may be rounded to 16 bits, or on a card to TF32.
        single: Operations in fp32: feedback, figures.
        double: Operations in fp64: the moments' factors.
        columns: Columns that are rounded one after the other.
        moved: Bytes read and written by the search for maxima.
    """

    passed: int
    moments: int
    single: int
    double: int
    columns: int
    moved: int

    @property
    def operations(self) -> int:
        """All of the products'."""
        return self.passed + self.moments + self.single + self.double

    def seconds(self, card: Card) -> float:
        """Time on a card, by its peaks and the shares of them that such kernels reach."""
        clock = card.multiprocessors * card.boost_mhz * 1e6
        single, double = (per_clock * clock for per_clock in _PLAIN[card.per_clock])
        products = (self.passed + 2 * self.moments) / card.arithmetic + self.single / single + self.double / double
        small = self.columns * _LAUNCHES * _LAUNCH
        return products / PRODUCT_SHARE + self.moved / (BANDWIDTH_SHARE * card.bandwidth) + small


def calibration_cost(shape: ModelShape, windows: int, length: int) -> Calibration:
    """Count what rounding every matrix of a model once asks for."""
    tokens, layers = windows * length, shape.dims.layers
    passed = moments = single = double = columns = moved = 0
    for group in input_groups(shape):
        width, values = group[0].in_features, sum(linear.size for linear in group)
        passed += (2 + 4) * tokens * values  # the pass; forward and the inputs' gradients
        moments += 2 * tokens * width**2
        single += values * width  # each column's error to all later ones
        single += 3 * 2 * values * width  # the outputs' squares of the weight and of two errors
        double += width**3 // 3 + width**3  # Cholesky factor; the inverse by solving for the identity
        columns += width
        moved += FULL * _SEARCHED * _CANDIDATES * values
    head = 2 * 3 * tokens * shape.dims.hidden * shape.dims.vocab  # tokens drawn; their likelihood, forward and back
    passed += head // layers
    return Calibration(*(layers * count for count in (passed, moments, single, double, columns, moved)))
