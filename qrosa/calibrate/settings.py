"""What a quantised model is made with, and what its report says of that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from qrosa.config import AdapterConfig
from qrosa.planner.bytes.calibration import MICRO_BATCH, WINDOW, WINDOWS
from qrosa.quant.hessian import DAMPING


@dataclass(frozen=True)
class QuantizeConfig:
    """How a base is quantised.

    Attributes:
        model: The 16-bit model: a folder, a hub id or a GGUF file.
        output: The folder to make.
        density: Share of the quantised weights with a sparse value.
        rank: Rank of the low-rank part of every matrix.
        rows: Calibration windows.
        length: Tokens a window.
        held_out: More windows, for perplexity.
        damping: Share of the second moments' mean diagonal that is added to it.
        seed: Of the windows and of the low-rank fit.
        micro_batch: Windows that a block computes at once.
    """

    model: str
    output: str
    density: float = 0.0
    rank: int = 0
    rows: int = WINDOWS
    length: int = WINDOW
    held_out: int = 16
    damping: float = DAMPING
    seed: int = 42
    micro_batch: int = MICRO_BATCH

    def adapter(self) -> AdapterConfig | None:
        """The repair's size as an adapter's settings, alpha such that its scale is 1; None without a repair."""
        if not self.density and not self.rank:
            return None
        return AdapterConfig(rank=self.rank, density=self.density, alpha=float(self.rank or 1), dropout=0.0)


def describe(config: QuantizeConfig, ids: Tensor, held_out: int, losses: Mapping[str, float]) -> dict[str, Any]:
    """The settings, the windows, and the perplexity that each form of the model has on those held out.

    Args:
        config: The settings.
        ids: All windows, int64 [B, L], those held out at the end.
        held_out: How many those are.
        losses: Mean loss a token of ``original``, ``nearest`` and what was made.
    """
    lost = losses["nearest"] - losses["original"]  # on a model that learnt nothing rounding may gain
    perplexity = {
        name: {
            "loss": loss,
            "perplexity": math.exp(loss),
            "won_back": (losses["nearest"] - loss) / lost if lost > 0 else None,
        }
        for name, loss in losses.items()
    }
    windows, length = len(ids) - held_out, ids.shape[1]
    return {
        "model": config.model,
        "settings": asdict(config),
        "calibration": {"windows": windows, "tokens": windows * length},
        "held_out": {"windows": held_out, "tokens": held_out * (length - 1)},
        "perplexity": perplexity,
    }
