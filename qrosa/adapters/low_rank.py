"""The low-rank part of one layer as one object: its tensors, their names in a file, and what they add to the weight.

What differs between forms (LoRA and others) is in the form; everybody else meets A, B and the scale here, whatever they
are made of. The tensors are bf16, in a file as on the device: their fp32 masters are the optimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qrosa.adapters.forms import FORMS, LORA, PREFIX, LowRankForm, form_of, of_low_rank
from qrosa.errors import InputError

_CHUNK = 1 << 18


class LowRank(nn.Module):
    """scale * B @ A for an [N, K] matrix.

    Args:
        tensors: The form's tensors by its names; bf16 ones are taken as they are, others are rounded.
        shape: (N, K).
        alpha: Scale numerator: ``scale`` is alpha / rank.
        dropout: Share of the part's inputs that are zeroed while training.
        form: What A and B are made of.

    Attributes:
        rank: r.
        has_gain: The form multiplies the rows of the sum, too.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        alpha: float,
        dropout: float = 0.0,
        form: LowRankForm = LORA,
    ) -> None:
        super().__init__()
        self.form, self.shape = form, shape
        self.rank = form.rank({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.alpha, self.dropout = float(alpha), float(dropout)
        self.has_gain = form.gain is not None
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.to(torch.bfloat16)))

    @classmethod
    def new(
        cls,
        shape: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float,
        *,
        weight: Callable[[], Tensor],
        generator: torch.Generator | None = None,
        form: LowRankForm = LORA,
    ) -> LowRank:
        """A part that does not change the layer's output yet.

        Args:
            shape: (N, K).
            rank: From 1 to min(N, K).
            alpha: Scale numerator.
            dropout: Share of the part's inputs that are zeroed while training.
            weight: Makes the layer's weight without the part, fp32 [N, K].
            generator: Source of the initial values, on the CPU, so that every device starts from the same ones.
            form: What A and B are made of.

        Raises:
            InputError: The rank does not fit.
        """
        if not 1 <= rank <= min(shape):
            raise InputError(
                f"rank {rank} does not fit a {shape[0]} x {shape[1]} matrix", f"use a rank from 1 to {min(shape)}"
            )
        tensors = {name: torch.empty(size) for name, size in form.shapes(*shape, rank).items()}
        form.start(tensors, generator, weight)
        return cls(tensors, shape, alpha, dropout, form)

    @classmethod
    def saved(
        cls, path: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], alpha: float, dropout: float = 0.0
    ) -> LowRank | None:
        """The part that a file holds for a layer, None if it holds none.

        Args:
            path: The layer's, for messages.
            tensors: The layer's tensors by their names in the file; those of other parts are passed over.
            shape: (N, K).
            alpha: Scale numerator.
            dropout: Share of the part's inputs that are zeroed while training.

        Raises:
            InputError: Tensors are missing, or have shapes of another matrix.
        """
        own = of_low_rank(tensors)
        if not own:
            return None
        form = form_of(own)
        if form is None:
            raise InputError(
                f"the low-rank part of {path} has {_listed(own)}, which is none of the forms {', '.join(FORMS)}",
                "copy the adapter folder again, or update qrosa",
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        empty = not all(size and math.prod(size) for size in shapes.values())
        if empty or form.shapes(*shape, form.rank(shapes)) != shapes:
            raise InputError(
                f"the low-rank part of {path} has {_listed(own)}, which do not fit a {shape[0]} x {shape[1]} matrix",
                "use the base that the adapter was trained on",
            )
        return cls(own, shape, alpha, dropout, form)

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / self.rank

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors, by their names in a file."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.named_parameters()}

    def share(self, other: LowRank) -> None:
        """Take over the parameters of ``other`` that the form shares."""
        for name in self.form.shared:
            self.register_parameter(name, other._parameters[name])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] in bf16, differentiable in the part's tensors."""
        return self.form.factors(self._parameters, *self.shape)  # type: ignore[arg-type]

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        """What the form multiplies the rows of the sum by, [N]; ``weight`` makes the sum, fp32 [N, K].

        Only for forms that do (``has_gain``).
        """
        assert self.form.gain is not None
        return self.form.gain(self._parameters, weight)  # type: ignore[arg-type]

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> Tensor:
        """Add scale * B @ A to ``weight`` fp32 [N, K], in place, and return it."""
        a, b = (factor.to(weight.device, weight.dtype) for factor in self.factors())
        return weight.addmm_(b, a, alpha=self.scale)

    @torch.no_grad()
    def at(self, positions: Tensor) -> Tensor:
        """scale * B @ A at flat positions ``row * K + column``, int64 [n] -> fp32 [n]; the product is never whole."""
        a, b = (factor.float() for factor in self.factors())
        values = torch.empty(positions.numel(), device=positions.device)
        for start in range(0, positions.numel(), _CHUNK):
            chunk = positions[start : start + _CHUNK]
            row = torch.div(chunk, self.shape[1], rounding_mode="floor")
            column = chunk - row * self.shape[1]
            values[start : start + _CHUNK] = self.scale * (b[row] * a.mT[column]).sum(1)
        return values

    @torch.no_grad()
    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Make scale * B @ A equal to the product of A [r, K] and B [N, r], fp32, the scale shared by both.

        Raises:
            InputError: The form cannot hold any product.
        """
        share = math.sqrt(self.scale)
        self.form.start_at(self._parameters, a / share, b / share)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Form and size, as ``print(model)`` shows them."""
        return f"{self.form.name}, rank={self.rank}, alpha={self.alpha:g}"


def _listed(tensors: Mapping[str, Tensor]) -> str:
    """``A [4, 64] and B [32, 4]``."""
    return " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
