"""Notices an adapter that other code has frozen, before a step is spent on it.

Helpers that prepare a quantised model for training freeze every parameter there is, adapters that are already in place
among them, and some make the embeddings' output require a gradient, so that ``backward`` finds something to do. The
loss then looks like any other and nothing is learnt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qrosa.adapters.inject import quantized_linears
from qrosa.errors import TrainingError


def watch_for_frozen(model: nn.Module) -> None:
    """Have the model's first forward pass in training mode refuse an adapter of which nothing trains.

    Args:
        model: The whole model; its adapter may still change.
    """

    def check(module: nn.Module, _: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        handle.remove()
        adapter = [p for layer in quantized_linears(module).values() for p in layer.adapter_parameters().values()]
        if adapter and not any(parameter.requires_grad for parameter in adapter):
            raise TrainingError(
                "nothing trains: every parameter of the adapter is frozen (requires_grad False)",
                "leave out prepare_model_for_kbit_training and its like: qrosa.load has frozen the base already",
            )

    handle = model.register_forward_pre_hook(check)
