"""The adapter's parameters as flat tensors, and what the training loop asks of whatever optimizes them.

Two optimizers answer to ``Optimizer``: ``AdapterOptimizer``, which keeps masters and states on the device, and
``ZeroOptimizer``, which shares them out over processes and moves them to the host. Both add gradients up in one flat
fp32 tensor a part, so the loop, the checkpoints and the checks are the same for both.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import adapter_parameters
from qrosa.errors import InputError

if TYPE_CHECKING:
    from qrosa.optim.machines import Processes

LOW_RANK, SPARSE = "low_rank", "sparse"


class FlatParameters:
    """Parameters of one kind with one flat fp32 gradient.

    Args:
        parameters: The model's parameters, in a fixed order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.size = sum(p.numel() for p in self.parameters)
        self.gradient = torch.zeros(self.size, dtype=torch.float32, device=self.parameters[0].device)
        self._gradient_parts = self._parts(self.gradient)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts, start = [], 0
        for parameter in self.parameters:
            parts.append(flat[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
        return parts

    @torch.no_grad()
    def flat(self) -> Tensor:
        """A new fp32 tensor of all values (exact: bf16 and fp32 both fit fp32)."""
        flat = torch.empty_like(self.gradient)
        for parameter, part in zip(self.parameters, self._parts(flat), strict=True):
            part.copy_(parameter)
        return flat

    @torch.no_grad()
    def write(self, pieces: Iterable[Tensor]) -> None:
        """Round flat fp32 values, which come in pieces from the first to the last, into the parameters."""
        targets = [parameter.detach().view(-1) for parameter in self.parameters]
        index = filled = 0
        for piece in pieces:
            while piece.numel():
                target = targets[index][filled : filled + piece.numel()]
                target.copy_(piece[: target.numel()])
                piece, filled = piece[target.numel() :], filled + target.numel()
                if filled == targets[index].numel():
                    index, filled = index + 1, 0

    def become_views(self, flat: Tensor) -> None:
        """Make fp32 parameters views of a flat tensor that holds their values."""
        for parameter, part in zip(self.parameters, self._parts(flat), strict=True):
            parameter.data = part

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the parameters' gradients to the flat fp32 gradient and free them."""
        for parameter, part in zip(self.parameters, self._gradient_parts, strict=True):
            if parameter.grad is not None:
                part.add_(parameter.grad)
                parameter.grad = None

    def zero_gradients(self) -> None:
        """Forget what was accumulated, and any ``.grad`` that a broken-off backward left behind."""
        self.gradient.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def digest(self) -> str:
        """SHA-256 of the parameters as the model sees them."""
        digest = hashlib.sha256()
        for parameter in self.parameters:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Optimizer(ABC):
    """What the training loop asks of an optimizer of the adapter, wherever its states are.

    With several processes, ``update``, ``add_sparse``, ``state_tensors``, ``gradient_norms`` and ``close`` are called
    on all of them.

    Attributes:
        accelerator: The processes that share a step; None for this one alone.
    """

    accelerator: Processes | None

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, FlatParameters]:
        """The parts that there are: ``low_rank``, ``sparse``."""

    @abstractmethod
    def add_sparse(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take in the sparse part, once."""

    @abstractmethod
    def update(self, *, lr: float, sparse_lr: float, max_norm: float) -> float:
        """Sum the gradients over the processes, clip, step, and write the model; gradients are zero afterwards.

        Returns:
            The norm of the sum before clipping. Where it is not finite, nothing was updated.
        """

    @abstractmethod
    def state_tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Everything that a resumed run needs, on the host; nothing where it is not ``wanted``."""

    @abstractmethod
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back ``state_tensors``' answer, bit for bit."""

    def accumulate(self) -> None:
        """Add the ``.grad`` of all parameters to the flat fp32 gradients and clear them."""
        for part in self.parts.values():
            part.accumulate()

    def zero_gradients(self) -> None:
        """Forget what was accumulated, and any ``.grad`` that a broken-off backward left behind."""
        for part in self.parts.values():
            part.zero_gradients()

    def gradient_norms(self) -> dict[str, float]:
        """By part, the sum over the processes of the norms of what each has accumulated."""
        norms = torch.stack([torch.linalg.vector_norm(part.gradient) for part in self.parts.values()])
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            norms = self.accelerator.reduce(norms)
        return dict(zip(self.parts, norms.tolist(), strict=True))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the parameters as the model sees them, by part: the same as long as nothing was learnt."""
        return {name: part.digest() for name, part in self.parts.items()}

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what outlives the object."""


def check_sparse(parts: Mapping[str, FlatParameters], parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a sparse part that an optimizer with ``parts`` cannot take in.

    Raises:
        InputError: There is a sparse part already, or its values are not fp32.
    """
    if SPARSE in parts:
        raise InputError("the optimizer has a sparse part already", "select masks once in a run")
    if any(p.dtype != torch.float32 for p in parameters):
        raise InputError("sparse values must be fp32", "do not cast the model after the masks are selected")


def adapter_parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The low-rank and the sparse parameters of a model, in model order.

    Raises:
        InputError: The sparse values do not keep the dtype that optimizers rely on.
    """
    low_rank, sparse = adapter_parameters(model)
    if any(parameter.dtype != torch.float32 for parameter in sparse):
        raise InputError("sparse values must be fp32", "do not cast the model")
    return low_rank, sparse
