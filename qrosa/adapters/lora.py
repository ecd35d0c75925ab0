"""LoRA (arXiv 2106.09685), the plain form of the low-rank part: B @ A, two free matrices. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Lora:
    """A [r, K] uniform and B [N, r] zero at first, so that a new part changes nothing."""

    name = "lora"
    gain: None = None
    shared: tuple[str, ...] = ()

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        """A [r, K] and B [N, r]."""
        return {"A": (rank, columns), "B": (rows, rank)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The rows of A."""
        return shapes["A"][0]

    def start(self, tensors: Mapping[str, Tensor], generator: Generator | None, weight: Callable[[], Tensor]) -> None:
        """Draw A as ``kaiming_uniform(a=sqrt(5))`` does, which is what LoRA implementations use; zero B."""
        bound = 1 / math.sqrt(tensors["A"].shape[1])
        tensors["A"].uniform_(-bound, bound, generator=generator)
        tensors["B"].zero_()

    def start_at(self, tensors: Mapping[str, Tensor], a: Tensor, b: Tensor) -> None:
        """Take the factors as they are."""
        tensors["A"].copy_(a)
        tensors["B"].copy_(b)

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """A and B themselves."""
        return tensors["A"], tensors["B"]

    def made(self, rows: int, columns: int, rank: int) -> int:
        """None: A and B are tensors of the part."""
        return 0

    def ramp_steps(self, total: int) -> int:
        """None: B is zero at first."""
        return 0
