"""The adapter's optimizer: two flat fp32 buffers, one for the low-rank part and one for the sparse part.

Low-rank matrices live in the model as bf16, whose 8 bits of mantissa swallow small updates. So the optimizer
owns an fp32 *master* of all of them, laid end to end in one tensor, updates that, and rounds it into the
model's matrices after each step. Sparse values are fp32 already: the model's parameters become *views* of
their flat master, so nothing is held twice and nothing is copied. Gradients are added in fp32, whatever the
model's dtype, over any number of micro-batches.

Flat buffers make everything else one call: clipping is a norm of two tensors, an all-reduce moves two tensors,
AdamW is torch's fused kernel on two tensors, bitsandbytes' 8-bit states quantise blocks of 256 over two tensors
(per-matrix states would leave small matrices in fp32: its limit is 4096 elements), and a checkpoint is a handful
of tensors that come back bit for bit. The trade-off: parameters cannot be added to a group later, except for the
one addition that this engine has, the sparse part after mask selection.

Paging means states that the driver moves between card and host. On the CPU there is nothing to page: the plain 8-bit
optimizer is used, which is what bitsandbytes falls back to there, and whose results are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrosa.errors import InputError, StorageError
from qrosa.optim.kinds import OPTIMIZERS
from qrosa.optim.parts import LOW_RANK, SPARSE, FlatParameters, Optimizer, check_sparse

if TYPE_CHECKING:
    from qrosa.optim.machines import Processes

_MakeOptimizer = Callable[[nn.Parameter], torch.optim.Optimizer]


class FlatGroup(FlatParameters):
    """Parameters of one kind as one flat fp32 master, which their optimizer updates.

    Args:
        parameters: The model's parameters, in a fixed order.
        make: Builds the torch optimizer of the master.
        views: Make the parameters views of the master (fp32 parameters), instead of rounded copies of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], make: _MakeOptimizer, *, views: bool) -> None:
        super().__init__(parameters)
        self.views = views
        self.master = nn.Parameter(self.flat())
        self.master.grad = self.gradient
        self._master_parts = self._parts(self.master.detach())
        if views:
            self.become_views(self.master.detach())
        self.optimizer = make(self.master)

    @torch.no_grad()
    def write_model(self) -> None:
        """Round the master into the model's parameters; nothing to do where they are views of it."""
        if not self.views:
            torch._foreach_copy_([p.detach() for p in self.parameters], self._master_parts)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One optimizer step at learning rate ``lr``; the gradient is zero afterwards."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.gradient.zero_()
        self.write_model()

    def state_tensors(self) -> dict[str, Tensor]:
        """Master and optimizer state as plain host tensors; a count becomes an int64 scalar."""
        tensors = {"master": self.master.detach()}
        for key, value in self.optimizer.state[self.master].items():
            tensors[key] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        if self.master.is_cuda:
            torch.cuda.synchronize(self.master.device)  # paged states are host memory that kernels write to
        return {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``state_tensors`` gave; the model's parameters follow the master.

        Raises:
            StorageError: Tensors are missing or of another size.
        """
        master = tensors.get("master")
        if master is None or master.shape != self.master.shape:
            raise StorageError("the optimizer state does not match the adapter", "resume from another checkpoint")
        self.master.copy_(master)
        self.write_model()
        self.gradient.zero_()
        saved = {key: value for key, value in tensors.items() if key != "master"}
        self.optimizer.state.pop(self.master, None)
        if not saved:  # saved before the first step
            return
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes: its own buffers, paged or not, are filled
            self.optimizer.init_state(self.optimizer.param_groups[0], self.master, 0, 0)
            self._fill(self.optimizer.state[self.master], saved)
        else:
            self.optimizer.state[self.master] = {key: value.to(self._home(key)) for key, value in saved.items()}

    def _home(self, key: str) -> torch.device:
        # torch's AdamW counts steps on the host unless its fused kernel wants the count on the card.
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        return self.master.device if key != "step" or fused else torch.device("cpu")

    def _fill(self, state: dict[str, Any], saved: dict[str, Tensor]) -> None:
        if set(state) != set(saved):
            raise StorageError("the optimizer state is of another optimizer", "resume with the same --optimizer")
        for key, value in saved.items():
            if isinstance(state[key], Tensor):
                state[key].copy_(value)
            else:
                state[key] = int(value)


class AdapterOptimizer(Optimizer):
    """One optimizer over the low-rank part and, once it exists, the sparse part, each with its own learning rate.

    Args:
        low_rank: Parameters of the low-rank part, any floating dtype; may be empty.
        sparse: Parameters of the sparse part, fp32; may be empty and may come later (``add_sparse``).
        kind: A name in ``qrosa.optim.kinds``.
        weight_decay: Decoupled weight decay.
        accelerator: The processes to sum gradients over; None for this one alone.
    """

    def __init__(
        self,
        low_rank: Sequence[nn.Parameter],
        sparse: Sequence[nn.Parameter] = (),
        *,
        kind: str = "adamw",
        weight_decay: float = 0.0,
        accelerator: Processes | None = None,
    ) -> None:
        if kind not in OPTIMIZERS:
            raise InputError(f"optimizer {kind!r} is unknown", f"use one of: {', '.join(OPTIMIZERS)}")
        self.kind = OPTIMIZERS[kind]
        self.accelerator = accelerator
        self.weight_decay = weight_decay
        self.groups: dict[str, FlatGroup] = {}
        if low_rank:
            self.groups[LOW_RANK] = FlatGroup(low_rank, self._make, views=False)
        if sparse:
            self.add_sparse(sparse)

    @property
    def parts(self) -> Mapping[str, FlatGroup]:
        """The parts that there are."""
        return self.groups

    def add_sparse(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take in the sparse part; its parameters become views of one flat fp32 tensor.

        Raises:
            InputError: There is a sparse part already, or its values are not fp32.
        """
        check_sparse(self.groups, parameters)
        if sum(p.numel() for p in parameters):
            self.groups[SPARSE] = FlatGroup(parameters, self._make, views=True)

    def _make(self, master: nn.Parameter) -> torch.optim.Optimizer:
        kind = self.kind
        if kind.stand_in is not None and master.device.type == "cpu":
            kind = OPTIMIZERS[kind.stand_in]
        optimizer = kind.make(master, self.weight_decay)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def gradients(self) -> list[Tensor]:
        """The flat fp32 gradients."""
        return [group.gradient for group in self.groups.values()]

    def update(self, *, lr: float, sparse_lr: float, max_norm: float) -> float:
        """Sum the gradients over the processes, clip them to ``max_norm`` and step; see ``Optimizer.update``."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            for gradient in self.gradients():
                gradient.copy_(self.accelerator.reduce(gradient))
        norm = self.clip(max_norm)
        if math.isfinite(norm):
            self.step(lr=lr, sparse_lr=sparse_lr)
        return norm

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their common norm is at most ``max_norm``.

        Returns:
            The norm before; NaN or inf where a gradient is, and then nothing is scaled.
        """
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        if math.isfinite(norm) and norm > max_norm:
            for gradient in self.gradients():
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self, *, lr: float, sparse_lr: float) -> None:
        """One AdamW step of each part at its own learning rate; gradients are zero afterwards."""
        for name, group in self.groups.items():
            group.step(sparse_lr if name == SPARSE else lr)

    @property
    def nbytes(self) -> int:
        """Bytes of masters, flat gradients and optimizer states."""
        total = 0
        for group in self.groups.values():
            state = [v for v in group.optimizer.state[group.master].values() if isinstance(v, Tensor)]
            total += sum(t.nbytes for t in (group.master, group.gradient, *state))
        return total

    def state_tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: ``low_rank.master``, ``sparse.exp_avg``, ..."""
        if not wanted:
            return {}
        return {f"{name}.{key}": t for name, group in self.groups.items() for key, t in group.state_tensors().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back ``state_tensors``' answer, bit for bit.

        Raises:
            StorageError: The state is of another adapter or another optimizer.
        """
        found = {name.split(".", 1)[0] for name in tensors}
        if found != set(self.groups):
            raise StorageError("the optimizer state has other parts than the adapter", "resume from another checkpoint")
        for name, group in self.groups.items():
            prefix = name + "."
            group.load_state_tensors({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
