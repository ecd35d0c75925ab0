"""The reference model of preference and reward training: the base that is trained on, with the adapter off.

Trainers ask for a second model, and load a 16-bit copy of the base where they are given none: four times the memory of
the packed one, and not the base that is trained on. Here it is a second tree of modules over the same tensors. What a
trainer does to it (another ``forward``, ``eval()``, dropout switched off) does not reach the model that is trained, and
it takes no memory: dense layers share their dictionaries of tensors, so that both move when one does, and a quantised
layer looks at the one in the model at each call.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrosa import ops
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.load import base_info
from qrosa.base.saving import SavesAdapter
from qrosa.quant.nf4 import NF4Weight

_MARK = "qrosa_reference"


class BareLinear(nn.Module):
    """The packed weight and the bias of another layer, wherever they are just now, without its adapter."""

    _layer: QRosaLinear

    def __init__(self, layer: QRosaLinear) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a child: its tensors are the model's to move, save and train

    @property
    def weight(self) -> NF4Weight:
        """The layer's packed weight."""
        return self._layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map X [..., K] to Y [..., N] in X's dtype."""
        layer = self._layer
        return ops.linear(x, layer.weight.operands(), layer.out_features, layer.bias)


class Reference:
    """What a model knows of its reference model.

    Attributes:
        used: Whether the reference model was ever called, or its tensors listed.
    """

    def __init__(self, reference: nn.Module) -> None:
        self.used = False
        self._handles = [reference.register_forward_pre_hook(self._mark_used)]

    def _mark_used(self, *_: Any) -> None:
        self.used = True


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """The base of ``model`` without its adapter, as a model of its own that takes no memory.

    For trainers that compare with a reference: ``DPOTrainer(model, ref_model=qrosa.reference_model(model), ...)``.

    Args:
        model: A model from ``qrosa.load``, before a trainer has it.

    Returns:
        A model of the same class in eval mode. It follows ``model`` from device to device, and holds nothing that is
        trained.
    """
    fingerprint = base_info(model).fingerprint
    reference = cast(PreTrainedModel, _twin(model, {}))
    reference.eval()
    reference.save_pretrained = SavesAdapter(reference, None)  # type: ignore[assignment]
    known = Reference(reference)
    setattr(model, _MARK, known)

    def name_base(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        # Packed weights are in no state dict, and trainers take its hash for the model's.
        known.used = True
        state[f"{prefix}qrosa_base"] = torch.tensor(list(fingerprint.encode()), dtype=torch.uint8)

    reference.register_state_dict_post_hook(name_base)
    return reference


def known_reference(model: nn.Module) -> Reference | None:
    """What is known of the reference model that was made of ``model``; None where there is none."""
    return getattr(model, _MARK, None)


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A module of the same class over the same tensors, and so are its children."""
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, QRosaLinear):
        return made.setdefault(id(module), BareLinear(module))
    twin = made[id(module)] = copy.copy(module)  # shares _parameters and _buffers
    held = vars(twin)
    for name in ("forward", _MARK):  # what somebody has put on the module itself
        held.pop(name, None)
    for name, value in held.items():
        if "_hooks" in name:
            held[name] = copy.copy(value)
    held["_modules"] = {name: child and _twin(child, made) for name, child in module._modules.items()}
    return twin
