"""The machines of a run whose machines step on their own, and the processes that still share each step: one machine's.

What travels in a step stays on a machine; what travels between machines goes over the processes of all of them, whose
ring enters and leaves each machine once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed
from torch import Tensor

from qrosa.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes(Protocol):
    """Processes that add tensors up: accelerate's, or those of one machine."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where this one has its tensors."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over them, on each."""


class Machines:
    """Where this process stands: its machine among all, and the processes that it shares that machine with.

    Args:
        accelerator: All processes, those of one machine next to each other, as launchers number them.
        here: Processes on this machine.

    Attributes:
        count: Machines.
        index: This one's.
        num_processes: Processes of each.
        device: Where this one has its tensors.
        leads: Whether this process writes its machine's files.

    Raises:
        InputError: Machines have different numbers of processes.
    """

    def __init__(self, accelerator: Accelerator, here: int) -> None:
        self.accelerator = accelerator
        self.num_processes = here
        self.device = accelerator.device
        total = accelerator.num_processes
        counts = self.gather([float(here)])
        if any(count != [here] for count in counts) or total % here:
            raise InputError(
                "--sync-every needs as many processes on each machine",
                f"there are {total} in all, and {here} on this one: give each launcher the same --nproc-per-node",
            )
        self.count = total // here
        self.index = accelerator.process_index // here
        self.leads = accelerator.process_index % here == 0
        # Of all processes one group is there already, and a lone process needs none.
        self._group = torch.distributed.new_subgroups(here)[0] if 1 < here < total else None

    @property
    def own(self) -> range:
        """The processes of this machine."""
        return range(self.index * self.num_processes, (self.index + 1) * self.num_processes)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over this machine's processes."""
        if self.num_processes == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=self._group)
        return total

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of all machines."""
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor)

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Every process's numbers, in the order of the processes; as many on each."""
        row = torch.tensor([numbers], dtype=torch.float64, device=self.accelerator.device)
        found: list[list[float]] = self.accelerator.gather(row).tolist()
        return found
