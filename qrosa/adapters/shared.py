"""One low-rank basis for all matrices of a kind, and a small core for each. Loads without torch.

scale * B C A with A [r, K] and B [N, r] for, say, all query projections of one shape, and C [r, r] for each of them. A
layer pays r^2 instead of r (N + K), so the same budget buys a higher rank: for 32 layers of N = K = 4096, LoRA trains
262,144 r parameters and this 8,192 r + 32 r^2. C starts at zero, A and B as LoRA's A does.

In a file the basis stands with the first layer of its kind, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qrosa.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor


class SharedBasis:
    """basis_A [r, K] and basis_B [N, r] of a kind, and core [r, r] of a matrix."""

    name = "shared"
    gain: None = None
    shared: tuple[str, ...] = ("basis_A", "basis_B")

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The basis and the core."""
        return {"basis_A": (rank, columns), "basis_B": (rows, rank), "core": (rank, rank)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The rows of the core."""
        return shapes["core"][0]

    def start(self, tensors: Mapping[str, Tensor], generator: Generator | None, weight: Callable[[], Tensor]) -> None:
        """Draw the basis as LoRA's A is drawn, each factor by the width that it reads; zero the core."""
        for name in self.shared:
            bound = 1 / math.sqrt(tensors[name].shape[1])
            tensors[name].uniform_(-bound, bound, generator=generator)
        tensors["core"].zero_()

    def start_at(self, tensors: Mapping[str, Tensor], a: Tensor, b: Tensor) -> None:
        """Refuse: one basis cannot hold the products of several matrices.

        Raises:
            InputError: Always.
        """
        raise InputError("--low-rank shared cannot start at any product", "leave --low-rank-init at lora")

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """A as it is, and B C."""
        return tensors["basis_A"], tensors["basis_B"] @ tensors["core"]

    def made(self, rows: int, columns: int, rank: int) -> int:
        """B C."""
        return rows * rank

    def ramp_steps(self, total: int) -> int:
        """None: the core is zero at first."""
        return 0


def kind_of(path: str) -> str:
    """What matrices at the same place of different layers have in common: ``model.layers.*.self_attn.q_proj``."""
    parts = path.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return path if layer is None else ".".join([*parts[:layer], "*", *parts[layer + 1 :]])
