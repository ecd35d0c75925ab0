"""What a base's config promises: the name and shape of every tensor of the model that is built from it.

Plan and load both hold a checkpoint against it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from qrosa.base.dimensions import Dimensions, Shapes, parameter_shapes


@dataclass(frozen=True)
class Structure:
    """The tensors of a model.

    Attributes:
        dims: Sizes and switches.
        shapes: Every parameter by name, in model order; a tied head is left out.
        linears: Paths of the matrices that are quantised, in model order.
        buffers: Tensors that are saved but are no parameters, with their shapes.
        head: Name of the head's matrix.
        embedding: Name of the embedding's.
        prefix: What comes before the names of the model without its head.
        rename: transformers' rule for names of older or other layouts; None where there is none.
        ignored: Names that older versions stored and that mean nothing now.
    """

    dims: Dimensions
    shapes: Shapes
    linears: tuple[str, ...]
    buffers: Shapes = field(default_factory=dict)
    head: str = "lm_head.weight"
    embedding: str = "model.embed_tokens.weight"
    prefix: str = "model"
    rename: Callable[[str], str] | None = None
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

    def with_head(self, *, tied: bool) -> Structure:
        """The same with a head that is tied to the embedding, or one of its own."""
        if tied == self.dims.tied:
            return self
        shapes = {name: shape for name, shape in self.shapes.items() if name != self.head}
        if not tied:
            shapes[self.head] = self.shapes[self.embedding]
        return replace(self, dims=replace(self.dims, tied=tied), shapes=shapes)


def known_structure(dims: Dimensions) -> Structure:
    """The structure of a family with an entry."""
    shapes = parameter_shapes(dims)
    linears = tuple(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("model.layers.") and name.endswith(".weight") and len(shape) == 2
    )
    return Structure(dims, shapes, linears)
