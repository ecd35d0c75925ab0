"""The real training step on tensors without data: what each phase takes, tensor by tensor, on a machine without a card.

The model is transformers' own class, adapters go in by the real budget, and mask selection, gradients, optimizer step
and evaluation are the functions that a run calls, on the ``meta`` device, where an operator computes sizes and nothing
else. Every tensor is counted as it comes and goes (``simulate_tracker``), so the peak is found where it is and not
where a formula expects it, and it has names. Only config.json is read. An 8B model takes some five seconds.

The same trace runs on a real model, where it counts real storages: a test holds the two against each other.

What is not a tensor is not here: the CUDA context, cuBLAS's workspace, blocks that the allocator caches or splits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from qrosa.base.open import open_config
from qrosa.errors import InputError
from qrosa.measure.card import fused_kernels, hidden_bytes
from qrosa.measure.trace import Trace, worst_micro_batches
from qrosa.measure.tracker import Allocation, Peak, StorageTracker
from qrosa.ops.products import widening
from qrosa.ops.workspace import meta_like_cpu
from qrosa.planner.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PHASES = ("select", "train", "eval")


@dataclass(frozen=True)
class LiveTensors:
    """Tensors of one kind at a peak; those of all decoder layers stand together.

    Attributes:
        component: What they are for.
        module: Path of the module that made them, layer numbers as ``*``.
        shape: Of one.
        dtype: Of one.
        count: How many.
        size: Bytes of all.
    """

    component: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    size: int

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        made = {"component": self.component, "module": self.module, "shape": list(self.shape), "dtype": self.dtype}
        return made | {"count": self.count, "bytes": self.size}


@dataclass(frozen=True)
class Simulation:
    """The peaks of a run's phases.

    Attributes:
        phases: Phase -> its peak; ``select`` only where masks are picked by gradients.
    """

    phases: dict[str, Peak]

    @property
    def highest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    def largest(self, phase: str, count: int = 10) -> list[LiveTensors]:
        """The largest tensors at a phase's peak, by the bytes of all of their kind."""
        return largest_tensors(self.phases[phase].allocations, count)


def simulate(source: str, work: Workload) -> Simulation:
    """Run selection, training and evaluation of a planned run without data.

    Args:
        source: The base, as the user named it; config.json is enough.
        work: The plan's settings.

    Raises:
        InputError: The model cannot be built, or DeepSpeed keeps the optimizer.
    """
    return simulate_model(open_config(source), work)


def simulate_model(config: PretrainedConfig, work: Workload) -> Simulation:
    """The same for a transformers config.

    Raises:
        InputError: DeepSpeed keeps the optimizer: its engine runs on real tensors only.
    """
    if work.zero is not None:
        raise InputError(
            f"--simulate cannot run DeepSpeed's optimizer ({work.zero.words})",
            "--probe runs it for real; or simulate without --deepspeed and --offload optimizer",
        )
    phases: dict[str, Peak] = {}
    for number, rows in enumerate(worst_micro_batches(work)):
        with _devices(work), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Trace.without_data(config, work).run(rows, select=number == 0)
        for name, peak in found.items():
            if name not in phases or peak.total > phases[name].total:
                phases[name] = peak
    return Simulation({name: phases[name] for name in PHASES if name in phases})


def measure(model: nn.Module, work: Workload, rows: Sequence[Sequence[int]]) -> Simulation:
    """The same of a loaded base on the CPU, with bytes that are really allocated; trains it for a step.

    Args:
        model: A loaded base without adapters.
        work: The settings.
        rows: Tokens of the rows of the step; the longest is selected on.
    """
    trace = Trace(model, work, StorageTracker("cpu", hidden=hidden_bytes))
    return Simulation(trace.run([list(row) for row in rows], select=True))


def largest_tensors(allocations: Sequence[Allocation], count: int) -> list[LiveTensors]:
    """Group allocations that differ in the decoder layer only, and take the largest groups."""
    groups: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
    for one in allocations:
        module = ".".join("*" if piece.isdigit() else piece for piece in one.module.split("."))
        key = (one.component, module, one.shape, str(one.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(one.size)
    made = [LiveTensors(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
    return sorted(made, key=lambda tensors: -tensors.size)[:count]


@contextmanager
def _devices(work: Workload) -> Iterator[None]:
    """``meta`` tensors behave as the planned device's."""
    scratch = meta_like_cpu() if work.on_cpu else nullcontext()
    with scratch, fused_kernels(work.on_cpu), widening("meta", work.widens):
        yield
