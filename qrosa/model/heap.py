"""Where a model's computation on the CPU looks at the heap: at each quantised layer, on the way forward and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.heap import bounded, look


def look_at_layers(model: nn.Module) -> None:
    """Look whenever a quantised layer of ``model`` is about to compute, or its input's gradient is there.

    The hooks stand on layers and not on blocks, whose own do not run again when they are recomputed.
    """

    def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        look()
        if bounded() and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: look())

    for layer in quantized_linears(model).values():
        layer.register_forward_pre_hook(before)
