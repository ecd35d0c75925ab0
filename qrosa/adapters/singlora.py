"""SingLoRA (arXiv 2507.05566): one matrix makes both factors, so a rank costs half of LoRA's. Loads without torch.

For a square weight the product is U U^T, which cannot drift as two factors of different size do. An [N, K] weight
takes the first N rows of U for B and the first K for A, the article's way for rectangular ones. U starts at random
values, and so does the product: what keeps the layer's output at first is a ramp on the scale over the first steps
(``ramp_steps``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qrosa.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

_SHARE, _LEAST = 0.01, 10  # of a run's steps, as in the article; fewer would be a jump where runs are short


class SingLora:
    """U [max(N, K), r]: B is its first N rows, A its first K, transposed."""

    name = "singlora"
    gain: None = None
    shared: tuple[str, ...] = ()

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        """U [max(N, K), r]."""
        return {"U": (max(rows, columns), rank)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The columns of U."""
        return shapes["U"][1]

    def start(self, tensors: Mapping[str, Tensor], generator: Generator | None, weight: Callable[[], Tensor]) -> None:
        """Draw U as the article does: uniform, by the number of its columns' rows."""
        bound = 1 / math.sqrt(tensors["U"].shape[0])
        tensors["U"].uniform_(-bound, bound, generator=generator)

    def start_at(self, tensors: Mapping[str, Tensor], a: Tensor, b: Tensor) -> None:
        """Refuse: U U^T is symmetric, and an error is not.

        Raises:
            InputError: Always.
        """
        raise InputError("--low-rank singlora cannot start at any product", "leave --low-rank-init at lora")

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """A, a transposed copy, and B, a view."""
        return tensors["U"][:columns].t().contiguous(), tensors["U"][:rows]

    def made(self, rows: int, columns: int, rank: int) -> int:
        """A is a copy."""
        return rank * columns

    def ramp_steps(self, total: int) -> int:
        """A hundredth of the run, ten steps at least."""
        return max(1, min(total, max(_LEAST, math.ceil(_SHARE * total))))
