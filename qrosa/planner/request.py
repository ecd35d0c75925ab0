"""TODO-DOC."""

from __future__ import annotations

from dataclasses import dataclass

from qrosa.base.shape import ModelShape
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.optim.zero.settings import ZeroSettings
from qrosa.planner.cards import Machines


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        shape: The base.
        adapter: Budget settings.
        masks: Mask settings.
        data: Data settings.
        train: Training settings.
        device: ``cuda`` or ``cpu``.
        cap: Bytes that may be used: of the card, or of the host.
        longest_row: Tokens of the longest row, None where no rows are known.
        machines: What to estimate the time of a step on, None for no estimate.
        host_cap: Bytes of host memory beside a card; None where device and host are one, or the host is not known.
        row_tokens: Tokens of all rows, 0 where no rows are known.
        zero: What DeepSpeed is to do, None without it.
    """

    shape: ModelShape
    adapter: AdapterConfig
    masks: MaskConfig
    data: DataConfig
    train: TrainConfig
    device: str
    cap: int
    longest_row: int | None
    machines: Machines | None = None
    host_cap: int | None = None
    row_tokens: int = 0
    zero: ZeroSettings | None = None
