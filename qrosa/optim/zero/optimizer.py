"""The adapter's optimizer under DeepSpeed: the same flat gradients, masters and states shared out by ZeRO.

The engine is built at the first step, from the masters that are there by then, and once more when the sparse part is
born: its states move over through the same tensors that a checkpoint holds. Building it twice is a second of a run;
sizing it for both parts from the start would hold the sparse part's buffers through warm-up and mask selection, where
memory is scarcest.

Under stage 2 the sparse values in the model are views of the engine's own flat tensor. Low-rank matrices, and all of
them under stage 3, are written piece by piece after each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qrosa.errors import StorageError
from qrosa.optim.parts import LOW_RANK, SPARSE, FlatParameters, Optimizer, check_sparse
from qrosa.optim.zero.settings import ZeroSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qrosa.optim.zero.engine import ZeroEngine

_MASTER = "master"


class ZeroOptimizer(Optimizer):
    """AdamW over both parts, each at its own learning rate, with masters and states where ``settings`` say.

    Args:
        low_rank: Parameters of the low-rank part; may be empty.
        sparse: Parameters of the sparse part, fp32; may be empty and may come later (``add_sparse``).
        settings: DeepSpeed's stage and offload.
        weight_decay: Decoupled weight decay.
        max_norm: Norm that ``update`` will be asked to clip to: DeepSpeed wants to know it from the start.
        accelerator: The processes; None for this one alone.
    """

    def __init__(
        self,
        low_rank: Sequence[nn.Parameter],
        sparse: Sequence[nn.Parameter] = (),
        *,
        settings: ZeroSettings,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.settings = settings
        self.weight_decay = weight_decay
        self.max_norm = max_norm
        self.accelerator = accelerator
        self.groups: dict[str, FlatParameters] = {}
        self._engine: ZeroEngine | None = None
        self._saved: dict[str, Tensor] = {}  # what the next engine starts from: masters and states that were loaded
        if low_rank:
            self.groups[LOW_RANK] = FlatParameters(low_rank)
        if sparse:
            self.add_sparse(sparse)

    @property
    def parts(self) -> Mapping[str, FlatParameters]:
        """The parts that there are."""
        return self.groups

    def add_sparse(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take in the sparse part; an engine that runs already is built again around both.

        Raises:
            InputError: There is a sparse part already, or its values are not fp32.
        """
        check_sparse(self.groups, parameters)
        if not sum(p.numel() for p in parameters):
            return
        if self._engine is not None:
            self._saved = self._engine.state_tensors()
            self.close()
        self.groups[SPARSE] = FlatParameters(parameters)

    def update(self, *, lr: float, sparse_lr: float, max_norm: float) -> float:
        """Sum over the processes, clip and step, all by DeepSpeed; see ``Optimizer.update``."""
        assert max_norm == self.max_norm
        engine = self._running()
        gradients = {name: group.gradient for name, group in self.groups.items()}
        norm = engine.step(gradients, {LOW_RANK: lr, SPARSE: sparse_lr})
        self._write_model(engine)
        for group in self.groups.values():
            group.gradient.zero_()
        return norm

    def _running(self) -> ZeroEngine:
        """The engine, built where there is none yet."""
        if self._engine is None:
            from qrosa.optim.zero.engine import ZeroEngine

            self._engine = ZeroEngine(
                {name: self._start(name) for name in self.groups},
                self.settings,
                device=self._device,
                weight_decay=self.weight_decay,
                max_grad_norm=self.max_norm,
            )
            self._engine.load_states(self._saved)
            self._saved = {}
            flat = self._engine.flat(SPARSE) if SPARSE in self.groups else None
            if flat is not None:
                self.groups[SPARSE].become_views(flat)
            self._write_model(self._engine)
        return self._engine

    def _start(self, name: str) -> Tensor:
        """A part's masters, on the device: those that were loaded, else the model's values."""
        saved = self._saved.get(f"{name}.{_MASTER}")
        return self.groups[name].flat() if saved is None else saved.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.groups.values())).gradient.device

    def _write_model(self, engine: ZeroEngine) -> None:
        """Round the masters into the model's parameters, those that are not views of them."""
        for name, group in self.groups.items():
            flat = engine.flat(name)
            if flat is None:
                group.write(engine.pieces(name))
            elif name != SPARSE:
                group.write([flat])

    def state_tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Masters and states, gathered from all processes, named as ``AdapterOptimizer`` names them."""
        return self._running().state_tensors(wanted=wanted)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``state_tensors`` gave, here or in an ``AdapterOptimizer``; the model follows the masters.

        Raises:
            StorageError: The state is of another adapter or another optimizer.
        """
        if {name.split(".", 1)[0] for name in tensors} != set(self.groups):
            raise StorageError("the optimizer state has other parts than the adapter", "resume from another checkpoint")
        for name, group in self.groups.items():
            master = tensors.get(f"{name}.{_MASTER}")
            if master is None or master.numel() != group.size:
                raise StorageError("the optimizer state does not match the adapter", "resume from another checkpoint")
            keys = {key.split(".", 1)[1] for key in tensors if key.startswith(f"{name}.")}
            if keys not in ({_MASTER}, {_MASTER, "step", "exp_avg", "exp_avg_sq"}):
                raise StorageError("the optimizer state is of another optimizer", "resume with the same --optimizer")
            group.write([master.to(self._device)])
            group.gradient.zero_()
        self.close()
        self._saved = dict(tensors)

    def close(self) -> None:
        """Give the engine back, with the model's values in tensors of their own."""
        if self._engine is not None:
            for parameter in self.groups[SPARSE].parameters if SPARSE in self.groups else ():
                parameter.data = parameter.data.clone()
            self._engine.close()
            self._engine = None
