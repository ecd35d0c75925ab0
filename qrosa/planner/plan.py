"""A plan: settings that fit, what each phase takes with them, and why; as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.adapters.budget import Allocation
from qrosa.errors import DoesNotFitError
from qrosa.masks.groups import group_matrices
from qrosa.planner.bytes.components import observed
from qrosa.planner.bytes.inference import verify_bytes
from qrosa.planner.bytes.peaks import PhaseMemory
from qrosa.planner.bytes.phases import traffic
from qrosa.planner.request import Request
from qrosa.planner.search.alternatives import Suggestion
from qrosa.planner.time.estimate import Estimate, estimate, micro_batch_rows, step_traffic
from qrosa.planner.workload import GRADIENT_SCORES, Workload
from qrosa.quantities import optimizer_parts, parse_offload, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from qrosa.planner.search.whatif import WhatIf

_OVERHEAD = ("cuda_context", "allocator_slack")  # what torch's own count of allocated bytes does not see


@dataclass(frozen=True)
class Plan:
    """Chosen settings and the memory of every phase.

    Attributes:
        request: What was asked for.
        work: The chosen settings.
        allocation: Where the trained parameters are.
        phases: Phase -> its memory, in order.
        reasons: Setting -> why it was chosen.
        ranks_measured: The allocation's ranks follow sensitivities; a plan, which reads no weights, has the default
            order's. They differ by a rank or so a matrix within one budget, and [T, r] is next to nothing of what a
            layer saves, so memory is planned once.
    """

    request: Request
    work: Workload
    allocation: Allocation
    phases: dict[str, PhaseMemory]
    reasons: dict[str, str]
    ranks_measured: bool = False

    @property
    def where(self) -> list[str]:
        """Where the budget goes, in words, a line each."""
        lines = self.allocation.describe()
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
    def fits_host(self) -> bool:
        """So is the host's, where it is known."""
        return self.request.host_cap is None or self.host_peak <= self.request.host_cap

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
            "eval_tokens": work.eval_tokens,
            "checkpointing": work.checkpointing,
            "offload": self.offload,
            "resident_blocks": work.resident_blocks,
            "attention": work.attention,
            "loss_chunk_tokens": work.loss_chunk_tokens,
            "mask_group_bytes": work.mask_group_bytes,
            "mask_passes": self.mask_passes,
            "optimizer": work.optimizer,
            "deepspeed": work.zero.words if work.zero is not None else None,
        }

    @property
    def offload(self) -> str:
        """What is kept on the host, as ``--offload`` would ask for it."""
        layers = [] if self.layer_offload == "none" else [self.layer_offload]
        return ",".join(layers + optimizer_parts(self.request.train.offload)) or "none"

    @property
    def layer_offload(self) -> str:
        """The same without the optimizer, which no plan moves by itself."""
        work = self.work
        disk = parse_offload(self.request.train.offload).disk
        base = f"base=disk:{disk}" if work.base_on_disk else "base"
        return ",".join(["activations"] * work.offload_activations + [base] * work.streamed) or "none"

    @property
    def mask_passes(self) -> int:
        """Times that mask selection reads its samples."""
        if not self.allocation.nnz_total or self.work.mask_score not in GRADIENT_SCORES:
            return 0
        return len(group_matrices(observed(self.allocation, self.work.mask_scope), self.work.mask_group_bytes))

    def nearest(self) -> list[Suggestion]:
        """Single changes that make the plan fit, the least painful first; empty when it fits as it is."""
        from qrosa.planner.search.alternatives import nearest

        return [] if self.fits else nearest(self)

    @property
    def traffic(self) -> dict[str, int]:
        """What crosses PCIe in a step -> its bytes, on one card with all of the batch."""
        return step_traffic(self.work, micro_batch_rows(self.work, self.request.train.batch_size))

    def estimate(self) -> Estimate | None:
        """The time of a training step, where a card is named."""
        machines = self.request.machines
        return None if machines is None else estimate(self.work, self.request.train.batch_size, machines)

    def what_if(self) -> list[WhatIf]:
        """How far the card reaches with and without each lever."""
        from qrosa.planner.search.whatif import what_if

        return what_if(self)

    def require_fit(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            DoesNotFitError: It does not; the hint names the nearest settings that do.
        """
        if self.fits:
            return
        ways = self.nearest()
        phase, peak, cap, what = self._tightest()
        raise DoesNotFitError(
            f"{phase} takes {size_text(peak)} of {what} at the least and {size_text(cap)} are there",
            "these would fit: " + ", or ".join(str(way) for way in ways) if ways else "use a smaller model",
        )

    def to_json(self) -> dict[str, Any]:
        """The document that ``qrosa plan --json`` prints and a run keeps as ``plan.json``."""
        estimated = self.estimate()
        return {
            "model": self.request.shape.source,
            "base": {
                "parameters": self.request.shape.base_parameters,
                "kind": self.request.shape.kind,
                "read_from": self.request.shape.read_from,
            },
            "budget": {
                "trainable": self.allocation.trainable,
                "share": self.allocation.share,
                "rank": self.allocation.rank,
                "density": self.allocation.density,
                "nnz": self.allocation.nnz_total,
                "low_rank_parameters": self.allocation.low_rank_parameters,
                "where": self.where,
            },
            "settings": self.settings,
            "reasons": self.reasons,
            "phases": {
                name: {
                    "device": {**memory.device, "total": memory.device_total},
                    "host": {**memory.host, "total": memory.host_total},
                    "disk": memory.disk,
                    "moment": memory.moment,
                }
                for name, memory in self.phases.items()
            },
            "verify": verify_bytes(self.work),
            "traffic": traffic(self.work),
            "traffic_per_step": self.traffic,
            "peak": self.peak,
            "vram": self.request.cap,
            "host_peak": self.host_peak,
            "host_memory": self.request.host_cap,
            "fits": self.fits,
            "nearest": [{"setting": way.setting, "value": way.value, "peak": way.peak} for way in self.nearest()],
            "estimate": estimated.to_json() if estimated else None,
            "what_if": [row.to_json() for row in self.what_if()],
        }

    def table(self) -> Table:
        """Phase by component, in megabytes, for a terminal."""
        from rich.table import Table

        table = Table(title=f"Memory in MB, on {_device_words(self.work)}", title_justify="left")
        table.add_column("", no_wrap=True)
        for name in self.phases:
            table.add_column(name, justify="right")
        columns = list(self.phases.values())
        for component in dict.fromkeys(key for memory in columns for key in memory.device):
            table.add_row(component.replace("_", " "), *(_megabytes(m.device.get(component)) for m in columns))
        table.add_section()
        table.add_row("device", *(_megabytes(m.device_total) for m in columns), style="bold")
        for component in dict.fromkeys(key for memory in columns for key in memory.host):
            name = f"host: {component.replace('_', ' ')}"
            table.add_row(name, *(_megabytes(m.host.get(component)) for m in columns), style="dim")
        table.add_row("host", *(_megabytes(m.host_total) for m in columns), style="bold")
        table.add_section()
        table.add_row("disk", *(_megabytes(m.disk) for m in columns))
        return table

    def verdict(self) -> str:
        """One line: fits or not, in what, and where the peak is."""
        phase, peak, cap, what = self._tightest()
        word = "fits" if self.fits else "does not fit"
        moment = self.phases[phase].moment
        return f"{word}: {size_text(peak)} of {size_text(cap)} {what}, at {phase} ({moment})"

    def _tightest(self) -> tuple[str, int, int, str]:
        """Phase, peak, cap and name of the memory that runs out; of the device's where none does."""
        host_cap = self.request.host_cap
        if self.fits_device and host_cap is not None and not self.fits_host:
            phase = max(self.phases, key=lambda name: self.phases[name].host_total)
            return phase, self.host_peak, host_cap, "host memory"
        phase = max(self.phases, key=lambda name: self.bytes_of(self.phases[name]))
        return phase, self.peak, self.request.cap, "host memory" if self.work.on_cpu else "device memory"


def _device_words(work: Workload) -> str:
    return "the CPU" if work.on_cpu else "the card"


def _megabytes(size: int | None) -> str:
    return "" if not size else f"{size / 2**20:,.1f}"


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
