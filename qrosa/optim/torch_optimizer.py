"""The adapter's optimizer behind torch's interface: for loops of one's own, and for trainers that take an optimizer.

Two parameter groups, ``low_rank`` and ``sparse``, each with its own ``lr`` that schedulers may turn, and a ``scale`` on
it that they leave alone: the sparse part rises over steps of its own, whatever schedule both follow. The masters are
fp32 whatever the model's dtype (see ``qrosa.optim.adamw``). A sparse part whose masks are picked later is taken in at
the next step, or when the state is asked for, and fills the second group then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.errors import InputError, TrainingError
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.parts import LOW_RANK, SPARSE, adapter_parts


class TorchAdapterOptimizer(torch.optim.Optimizer):
    """``AdapterOptimizer`` as a ``torch.optim.Optimizer``.

    Args:
        model: A model with adapters, on the device where it will be trained.
        lr: Learning rate of the low-rank part.
        sparse_lr: Learning rate of the sparse part.
        weight_decay: Decoupled weight decay.
        kind: A name in ``qrosa.optim.kinds``.

    Raises:
        InputError: The model has no adapter, or a frozen one.
    """

    def __init__(self, model: nn.Module, *, lr: float, sparse_lr: float, weight_decay: float, kind: str) -> None:
        low_rank, sparse = adapter_parts(model)
        if not low_rank and not sparse:
            raise InputError("the model has no adapter to optimize", "load it with an AdapterConfig first")
        check_not_frozen([*low_rank, *sparse])
        self.model = model
        self.inner = AdapterOptimizer(low_rank, sparse, kind=kind, weight_decay=weight_decay)
        groups = [
            {"params": low_rank, "lr": lr, "scale": 1.0, "name": LOW_RANK},
            {"params": sparse, "lr": sparse_lr, "scale": 1.0, "name": SPARSE},
        ]
        # torch refuses neither an empty group nor one that fills later; DeepSpeed does (use qrosa.finetune there).
        super().__init__(groups, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update masters and model from the ``.grad`` that there are, and clear them.

        Raises:
            TrainingError: No adapter parameter has a gradient.
        """
        loss = None if closure is None else closure()
        self._take_in_sparse()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            raise TrainingError(
                "nothing trains: no parameter of the adapter has a gradient",
                "call backward() before step(), and do not freeze the adapter (requires_grad_(False), "
                "prepare_model_for_kbit_training)",
            )
        self.inner.accumulate()
        rates = {group["name"]: float(group["lr"]) * group["scale"] for group in self.param_groups}
        self.inner.step(lr=rates[LOW_RANK], sparse_lr=rates[SPARSE])
        return loss

    def _take_in_sparse(self) -> None:
        sparse = self.param_groups[1]["params"]
        if sparse or all(layer.nnz == 0 for layer in quantized_linears(self.model).values()):
            return
        sparse.extend(adapter_parts(self.model)[1])
        gradients = [parameter.grad for parameter in sparse]
        self.inner.add_sparse(sparse)  # from here on the parameters are views of their master
        for parameter, gradient in zip(sparse, gradients, strict=True):
            parameter.grad = gradient

    @property
    def has_state(self) -> bool:
        """Whether a step was taken, or a state loaded."""
        return any(group.optimizer.state for group in self.inner.groups.values())

    def state_dict(self) -> dict[str, Any]:
        """Masters and states as plain host tensors, and each group's settings."""
        self._take_in_sparse()
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"state": self.inner.state_tensors(), "param_groups": settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back ``state_dict``'s answer, bit for bit.

        Raises:
            StorageError: It is of another adapter or another optimizer.
        """
        self._take_in_sparse()
        state: dict[str, Tensor] = state_dict["state"]
        self.inner.load_state_tensors(state)
        for group, settings in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(settings)


def check_not_frozen(parameters: list[nn.Parameter]) -> None:
    """Refuse an adapter that something has frozen.

    Raises:
        InputError: One of its parameters takes no gradient.
    """
    if not all(parameter.requires_grad for parameter in parameters):
        raise InputError(
            "the adapter is frozen: parameters of it have requires_grad False",
            "leave out prepare_model_for_kbit_training and its like: qrosa.load has frozen the base already",
        )
