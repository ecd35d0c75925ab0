"""The forms that a low-rank part can take: what one has to say of itself, and the table of those that there are.

Every form adds scale * B @ A to the weight, with A [r, K] and B [N, r] made from its own tensors: LoRA trains the two
themselves; others tie them to each other or to a core. A form may also multiply the rows of the sum (``gain``), as
weight-decomposed adapters do. So the fused op, the export and the arithmetic of the budget serve them all. A new form
is a file like ``lora.py`` and its line in ``FORMS``.

Nothing here needs torch, for the budget is planned without it; a form only calls methods of the tensors it gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

from qrosa.adapters.lora import Lora
from qrosa.adapters.shared import SharedBasis, kind_of
from qrosa.adapters.singlora import SingLora
from qrosa.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

PREFIX = "low_rank_"
"""What the names of a low-rank part's tensors start with in a file, before the form's own."""

Shapes = Mapping[str, tuple[int, ...]]
Gain = Callable[[Mapping[str, "Tensor"], Callable[[], "Tensor"]], "Tensor"]
"""(tensors by the names of ``shapes``, what makes the sum base + S + scale * B @ A in fp32 [N, K]) -> factors [N],
differentiable in the tensors."""
T = TypeVar("T")


class LowRankForm(Protocol):
    """One way to make A and B; it holds no tensors itself."""

    @property
    def name(self) -> str:
        """As ``--low-rank`` names it."""

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of an [N, K] matrix at a rank from 1 on; their sizes are what the rank costs.

        No two forms have the same names, which tell a saved part's form. No rank may cost less than the one before it.
        """

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the tensors that all matrices of a kind (``kind_of``) and shape have in common, as their rank."""

    def rank(self, shapes: Shapes) -> int:
        """The rank of a part with tensors of these shapes."""

    def start(self, tensors: Mapping[str, Tensor], generator: Generator | None, weight: Callable[[], Tensor]) -> None:
        """Fill new fp32 tensors on the CPU so that the layer's output does not change, or not yet (``ramp_steps``).

        Args:
            tensors: By the names of ``shapes``.
            generator: Source of random values.
            weight: Makes the layer's weight without the part, fp32 [N, K], for forms that start from it.
        """

    def start_at(self, tensors: Mapping[str, Tensor], a: Tensor, b: Tensor) -> None:
        """Fill the tensors so that ``factors`` gives A [r, K] and B [N, r] like these.

        Raises:
            InputError: The form cannot hold any product.
        """

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r], contiguous, differentiable in the tensors."""

    def made(self, rows: int, columns: int, rank: int) -> int:
        """Elements of the factors that are not the part's own tensors, and are kept for backward beside them."""

    def ramp_steps(self, total: int) -> int:
        """Steps of a run of ``total`` over which the scale rises to what it is; 0 where it is so from the first on."""

    @property
    def gain(self) -> Gain | None:
        """Makes what the rows of the sum are multiplied by; None for a form that leaves them as they are."""


LORA: LowRankForm = Lora()
FORMS: dict[str, LowRankForm] = {form.name: form for form in (LORA, SharedBasis(), SingLora())}

_SHARED = frozenset(f"{PREFIX}{name}" for form in FORMS.values() for name in form.shared)


def form_named(name: str) -> LowRankForm:
    """The form that ``--low-rank`` asks for.

    Raises:
        InputError: There is none of that name.
    """
    if name not in FORMS:
        raise InputError(f"--low-rank {name!r} is unknown", f"use one of: {', '.join(FORMS)}")
    return FORMS[name]


def form_of(names: Iterable[str]) -> LowRankForm | None:
    """The form whose tensors have exactly these names, None if there is none."""
    wanted = set(names)
    return next((form for form in FORMS.values() if set(form.shapes(1, 1, 1)) == wanted), None)


def of_low_rank(saved: Mapping[str, T]) -> dict[str, T]:
    """What a file holds of a layer's low-rank part, by the form's names; whatever is known of each tensor."""
    return {name.removeprefix(PREFIX): known for name, known in saved.items() if name.startswith(PREFIX)}


def saved_rank(shapes: Shapes) -> int:
    """Rank of a saved part, from its tensors' shapes by the form's names; 0 where no form has such tensors."""
    form = form_of(shapes)
    return 0 if form is None or not all(shapes.values()) else form.rank(shapes)


def parameter_count(form: LowRankForm, rows: int, columns: int, rank: int, matrices: int = 1) -> int:
    """Parameters of the parts of so many [N, K] matrices of a kind; none at rank 0."""
    if not rank:
        return 0
    sizes = {name: math.prod(shape) for name, shape in form.shapes(rows, columns, rank).items()}
    return sum(size if name in form.shared else matrices * size for name, size in sizes.items())


def with_shared(
    tensors: Mapping[str, Mapping[str, T]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, T]]:
    """Give every layer what a file has once for all of its kind.

    Args:
        tensors: Layer -> name in the file -> what is known of the tensor.
        shapes: Layer -> (N, K).

    Returns:
        The same, where a layer with a low-rank part has the shared tensors of its kind and shape, too.
    """
    bases: dict[tuple[str, tuple[int, ...]], dict[str, T]] = {}
    for path, own in tensors.items():
        held = {name: known for name, known in own.items() if name in _SHARED}
        bases.setdefault((kind_of(path), tuple(shapes[path])), {}).update(held)
    return {
        path: {**bases[kind_of(path), tuple(shapes[path])], **own} if of_low_rank(own) else dict(own)
        for path, own in tensors.items()
    }
