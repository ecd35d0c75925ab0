"""A plan: the settings that were chosen, and what each phase takes with them.

A record: ``search`` makes it, ``reasons`` explains it, ``show`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.adapters.budget import Allocation
from qrosa.adapters.describe import describe_allocation
from qrosa.masks.passes import group_matrices
from qrosa.planner.bytes.components import observed
from qrosa.planner.bytes.peaks import PhaseMemory
from qrosa.planner.request import Request
from qrosa.planner.time.estimate import Estimate, estimate, micro_batch_rows, step_traffic
from qrosa.planner.workload import Workload
from qrosa.quantities import optimizer_parts, parse_offload

if TYPE_CHECKING:
    pass

_BESIDE = ("cuda_context", "nccl")  # what is not torch's
_OVERHEAD = (*_BESIDE, "allocator_slack")  # what torch's own count of allocated bytes does not see


@dataclass(frozen=True)
class Timed:
    """Settings that fit, and the estimated seconds of a step with them."""

    work: Workload
    seconds: float


@dataclass(frozen=True)
class Choice:
    """What was chosen by its estimated time, and what it was chosen from.

    Attributes:
        card: Where the time was estimated.
        chosen: The settings that were taken.
        among: All that fit, in the order in which levers are pulled.
    """

    card: str
    chosen: Timed
    among: list[Timed]


@dataclass(frozen=True)
class Plan:
    """Chosen settings and the memory of every phase.

    Attributes:
        request: What was asked for.
        work: The chosen settings.
        allocation: Where the trained parameters are.
        phases: Phase -> its memory, in order.
        choice: What the settings were chosen over by their estimated time, None where nothing was timed.
        ranks_measured: The allocation's ranks follow sensitivities; a plan, which reads no weights, has the default
            order's. They differ by a rank or so a matrix within one budget, and [T, r] is next to nothing of what a
            layer saves, so memory is planned once.
    """

    request: Request
    work: Workload
    allocation: Allocation
    phases: dict[str, PhaseMemory]
    choice: Choice | None = None
    ranks_measured: bool = False

    @property
    def where(self) -> list[str]:
        """Where the budget goes, in words, a line each."""
        lines = describe_allocation(self.allocation)
        if self.request.adapter.rank_by == "sensitivity":
            words = "follow sensitivities measured on training rows"
            later = "by sensitivity are measured after loading; planned with the default order"
            lines.append(f"ranks {words if self.ranks_measured else later}")
        return lines

    @property
    def peak(self) -> int:
        """Most bytes that any phase takes of the memory that is capped."""
        return max(self.bytes_of(memory) for memory in self.phases.values())

    @property
    def host_peak(self) -> int:
        """Most bytes that any phase takes of host memory beside the device's."""
        return max(memory.host_total for memory in self.phases.values())

    @property
    def fits_device(self) -> bool:
        """The peak is within the cap."""
        return self.peak <= self.request.cap

    @property
    def pinned_peak(self) -> int:
        """Most bytes of host memory that any phase pins for a card."""
        return max(
            sum(size for name, size in memory.host.items() if name.startswith("pinned"))
            for memory in self.phases.values()
        )

    @property
    def fits_pinned(self) -> bool:
        """What is pinned is within what the system pins, where it has a limit of its own."""
        return self.request.pinned_cap is None or self.pinned_peak <= self.request.pinned_cap

    @property
    def fits_host(self) -> bool:
        """The host's peak is within its cap, where one is known, and so is what is pinned of it."""
        known = self.request.host_cap
        return (known is None or self.host_peak <= known) and self.fits_pinned

    @property
    def fits(self) -> bool:
        """Nothing runs out."""
        return self.fits_device and self.fits_host

    def bytes_of(self, memory: PhaseMemory) -> int:
        """A phase's bytes of the memory that is capped: the card's, or on the CPU the whole process's."""
        return memory.device_total + (memory.host_total if self.work.on_cpu else 0)

    @property
    def planned(self) -> dict[str, int]:
        """Phase -> bytes as a run measures them: allocated by torch on a card, resident in the process on the CPU."""
        hidden = () if self.work.on_cpu else _OVERHEAD
        return {
            name: self.bytes_of(memory) - sum(memory.device.get(component, 0) for component in hidden)
            for name, memory in self.phases.items()
        }

    @property
    def beside(self) -> int:
        """Bytes of a card that the process takes and torch's allocator does not."""
        return max(sum(memory.device.get(name, 0) for name in _BESIDE) for memory in self.phases.values())

    @property
    def settings(self) -> dict[str, Any]:
        """What training reads: micro-batch, checkpointing, chunks, groups, length."""
        work = self.work
        return {
            "device": work.device,
            "seq_len": self.request.data.seq_len or work.length,
            "longest_row": work.length,
            "batch_size": self.request.train.batch_size,
            "micro_batch": work.rows,
            "micro_batch_tokens": work.tokens,
            "packing": work.packed,
            "eval_tokens": work.eval_tokens,
            "checkpointing": work.checkpointing,
            "offload": self.offload,
            "resident_blocks": work.resident_blocks,
            "attention": work.attention,
            "loss_chunk_tokens": work.loss_chunk_tokens,
            "mask_selection": self.mask_selection,
            "mask_candidates": work.mask_candidates,
            "mask_group_bytes": work.mask_group_bytes,
            "mask_passes": self.mask_passes,
            "optimizer": work.optimizer,
            "deterministic": work.deterministic,
            "sync_every": work.sync_every if work.sync_every > 1 else None,
            "deepspeed": work.zero.words if work.zero is not None else None,
        }

    @property
    def offload(self) -> str:
        """What is kept on the host, as ``--offload`` would ask for it."""
        layers = [] if self.layer_offload == "none" else [self.layer_offload]
        return ",".join(layers + optimizer_parts(self.request.train.offload)) or "none"

    @property
    def layer_offload(self) -> str:
        """What is kept on the host of layers: activations and base. No plan moves the optimizer by itself."""
        work = self.work
        disk = parse_offload(self.request.train.offload).disk
        base = f"base=disk:{disk}" if work.base_on_disk else "base"
        return ",".join(["activations"] * work.offload_activations + [base] * work.streamed) or "none"

    @property
    def mask_selection(self) -> str | None:
        """How statistics are collected, as ``--mask-selection`` would ask for it; None where none are."""
        if not self.work.selects_by_gradients:
            return None
        return "stream" if self.work.mask_candidates else "exact"

    @property
    def mask_passes(self) -> int:
        """Times that mask selection reads its samples."""
        if not self.work.selects_by_gradients:
            return 0
        if self.work.mask_candidates:
            return 1
        return len(group_matrices(observed(self.allocation, self.work.mask_scope), self.work.mask_group_bytes))

    @property
    def traffic(self) -> dict[str, int]:
        """What crosses PCIe in a step -> its bytes, on one card with all of the batch."""
        return step_traffic(self.work, micro_batch_rows(self.work, self.request.train.step_rows))

    def estimate(self) -> Estimate | None:
        """The time of a training step, where a card is named."""
        machines = self.request.machines
        return None if machines is None else estimate(self.work, self.request.train.step_rows, machines)

    @property
    def tightest(self) -> tuple[str, int, int, str]:
        """Phase, peak, cap and name of the memory that runs out; of the device's where none does."""
        host_cap, pinned_cap = self.request.host_cap, self.request.pinned_cap
        if self.fits_device and pinned_cap is not None and not self.fits_pinned:
            phase = max(self.phases, key=lambda name: self.phases[name].host_total)
            return phase, self.pinned_peak, pinned_cap, "pinned host memory"
        if self.fits_device and host_cap is not None and not self.fits_host:
            phase = max(self.phases, key=lambda name: self.phases[name].host_total)
            return phase, self.host_peak, host_cap, "host memory"
        phase = max(self.phases, key=lambda name: self.bytes_of(self.phases[name]))
        return phase, self.peak, self.request.cap, "host memory" if self.work.on_cpu else "device memory"
