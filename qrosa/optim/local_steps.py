"""The adapter's optimizer where machines are far apart: each steps on its own, and now and then they meet.

Between two meetings a step's gradient is summed over one machine's processes only, so nothing crosses the network. At a
meeting the machines' moves become one (``qrosa.optim.outer_step``) and all go on from the same values. Their AdamW
states stay their own: they describe gradients, which the machines have alike, and cost twice what a meeting costs.

A meeting sends a norm a part and process, then each part once in fp32: what one step of plain training sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.machines import Machines
from qrosa.optim.outer_step import OuterPart, move_weights

_OUTER = "outer."  # of its tensors' names in a checkpoint


class LocalStepsOptimizer(AdapterOptimizer):
    """An ``AdapterOptimizer`` on each machine, and an outer step that joins them.

    Args:
        low_rank: As of ``AdapterOptimizer``; values are the same on every machine.
        sparse: The same.
        machines: Where this process stands.
        outer_lr: Learning rate of the outer step.
        outer_momentum: Its momentum.
        options: ``kind`` and ``weight_decay`` of the steps in between.
    """

    def __init__(
        self,
        low_rank: Sequence[nn.Parameter],
        sparse: Sequence[nn.Parameter] = (),
        *,
        machines: Machines,
        outer_lr: float,
        outer_momentum: float,
        **options: Any,
    ) -> None:
        self.machines = machines
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self._outer: dict[str, OuterPart] = {}
        super().__init__(low_rank, sparse, accelerator=machines, **options)
        self._know_parts()

    def _know_parts(self) -> None:
        """Take the values of parts that are new for the common ones."""
        for name, group in self.groups.items():
            if name not in self._outer:
                self._outer[name] = OuterPart(group.master, lr=self.outer_lr, momentum=self.outer_momentum)

    def add_sparse(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take in the sparse part, whose values are the same on every machine; call it right after a meeting."""
        super().add_sparse(parameters)
        self._know_parts()

    @torch.no_grad()
    def meet(self) -> dict[str, list[float]]:
        """Make the machines' values one; called on every process after the same number of steps.

        Returns:
            Part -> weight of each machine; zeros where all went back to the values of the last meeting.
        """
        for name, group in self.groups.items():
            # The flat gradient is zero between steps, and as large as what is needed here.
            group.gradient.copy_(self._outer[name].values).neg_().add_(group.master)
        norms = [float(torch.linalg.vector_norm(g.gradient, dtype=torch.float64)) for g in self.groups.values()]
        told = self.machines.gather(norms)[:: self.machines.num_processes]
        return {
            name: self._meet_part(name, [machine[index] for machine in told]) for index, name in enumerate(self.groups)
        }

    def _meet_part(self, name: str, norms: list[float]) -> list[float]:
        group, outer = self.groups[name], self._outer[name]
        weights = move_weights(norms, outer.usual)
        own = weights[self.machines.index] / self.machines.num_processes
        if own:
            group.gradient.mul_(own)
        else:
            group.gradient.zero_()  # what is not finite stays that whatever it is multiplied by
        if any(weights):
            outer.step(self.machines.total(group.gradient).cpu())
        outer.usual = outer.usual.after(norms)
        group.master.copy_(outer.values)
        group.write_model()
        group.gradient.zero_()
        return weights

    def state_tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """This machine's state and the outer step's, right after a meeting: there the masters are the common values."""
        outer = {
            f"{_OUTER}{name}.{key}": tensor
            for name, part in self._outer.items()
            for key, tensor in part.state_tensors().items()
        }
        return super().state_tensors(wanted=wanted) | (outer if wanted else {})

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back ``state_tensors``' answer, bit for bit.

        Raises:
            StorageError: The state is of another adapter or another optimizer.
        """
        super().load_state_tensors({key: value for key, value in tensors.items() if not key.startswith(_OUTER)})
        self._outer = {}
        self._know_parts()
        for name, part in self._outer.items():
            prefix = f"{_OUTER}{name}."
            part.load_state_tensors(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )


def left_out(weights: Mapping[str, Sequence[float]], step: int) -> list[str]:
    """What a meeting after ``step`` steps did not take, in words, a line each."""
    lines = []
    for name, shares in weights.items():
        part = name.replace("_", "-")
        if not any(shares):
            lines.append(
                f"after step {step} every machine's {part} part moved unusually far: all go back to the last meeting"
            )
            continue
        lines += [
            f"after step {step} the {part} part of machine {index + 1} moved unusually far and was left out"
            for index, share in enumerate(shares)
            if share == 0.0
        ]
    return lines
