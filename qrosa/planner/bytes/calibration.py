"""What ``qrosa quantize`` holds, by count.

The pass over the 16-bit model dominates: embeddings and the windows' hidden states stay, one block's weights and one
micro-batch visit, and then the block's matrices are rounded with the second moments of their inputs. Of the matrices
that share an input (q, k and v; gate and up) the largest group sets the peak; factoring and rounding follow each
other, and the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from qrosa.adapters.rank_units import LinearShape
from qrosa.base.shape import ModelShape
from qrosa.planner.bytes.activations import FULL, HALF, MicroBatch, forward_workspace, rotary_bytes
from qrosa.planner.bytes.components import unquantised_bytes

# What a base is calibrated with unless something else is asked for; ``qrosa finetune`` asks for nothing else.
WINDOWS, WINDOW, MICRO_BATCH = 128, 256, 8
IMPORTANCE_ROWS = 2  # windows that are weighed in one backward pass
SCORE_TOKENS = 4096  # whose loss is measured at once, of qrosa.eval.perplexity
_DOUBLE = 8
_FACTOR_MATRICES = 3  # fp64 [K, K] at once: the factor, the identity and the inverse
_ROUNDING = 8 * FULL + 2  # bytes a value of the group, see ``rounding_bytes``
_SPARSE = 3  # masks of the parts, joined and transposed
_LOW_RANK = FULL  # the product
_COLUMN_BLOCK = 96  # of qrosa.quant.feedback


def calibration_bytes(
    shape: ModelShape, windows: int, length: int, micro_batch: int, *, sparse: bool, low_rank: bool, on_card: bool
) -> dict[str, int]:
    """Bytes on the device at the peak of the pass over the blocks, by component.

    Args:
        shape: The base.
        windows: Calibration windows.
        length: Tokens a window.
        micro_batch: Windows that a block computes at once.
        sparse: A sparse part is made beside the base.
        low_rank: A low-rank part is.
        on_card: 16-bit computation, as on a card; else fp32, as on the CPU.
    """
    widen = 1 if on_card else 2
    batch = MicroBatch(micro_batch * length, length, rows=micro_batch)
    groups = input_groups(shape)
    activations = forward_workspace(shape.dims, batch, "sdpa", False) + rotary_bytes(shape.dims, batch)
    rounding = max(max(factor_bytes(group), rounding_bytes(group, sparse, low_rank)) for group in groups)
    parts = {
        "unquantised": widen * unquantised_bytes(shape),
        # A block's input, its output in pieces, and these joined.
        "hidden": 3 * widen * HALF * windows * length * shape.dims.hidden,
        "block": widen * HALF * sum(linear.size for group in groups for linear in group),
        "moments": FULL * sum(group[0].in_features ** 2 for group in groups),
        "workspace": max(widen * activations, rounding),
    }
    return {**parts, "total": sum(parts.values())}


def factor_bytes(group: Sequence[LinearShape]) -> int:
    """Beside the moments, to factor those of a group's input."""
    return _FACTOR_MATRICES * _DOUBLE * group[0].in_features ** 2


def rounding_bytes(group: Sequence[LinearShape], sparse: bool, low_rank: bool) -> int:
    """Beside the moments and the 16-bit weights, to round a group, its factor [K, K] at hand.

    In fp32 the weights, the targets and their joined form, the joined scales, the transposed copy that is worked on,
    the transposed scales, and what was wanted and decoded; in bytes the codes in both orders.
    """
    values = sum(linear.size for linear in group)
    rows = sum(linear.out_features for linear in group)
    a_value = _ROUNDING + (_SPARSE if sparse else 0) + (_LOW_RANK if low_rank else 0)
    return a_value * values + FULL * (group[0].in_features ** 2 + _COLUMN_BLOCK * rows)


def input_groups(shape: ModelShape) -> list[list[LinearShape]]:
    """The matrices of the first block by shared input, told by their names as transformers has them."""
    first = min(linear.layer for linear in shape.linears)
    groups: dict[str, list[LinearShape]] = {}
    for linear in shape.linears:
        if linear.layer == first:
            stem, _, name = linear.path.rpartition(".")
            shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name, name)
            groups.setdefault(f"{stem}.{shared}", []).append(linear)
    return list(groups.values())
