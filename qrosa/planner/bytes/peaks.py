"""Moments at which a phase may peak, and the peak of a phase.

A phase passes through *moments* at which it may peak: training, for one, at the loss, where all saved activations meet
the logits, or at the first layer of backward, where they meet that layer's workspace. Each moment is a sum of
components; a phase's figures are those of its highest moment, so components add up to the total exactly, and
tensors that never meet are not added. Adding up each component's own peak would be simpler and some 10% too high.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qrosa.adapters.forms import form_named
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.activations import (
    FULL,
    HALF,
    MicroBatch,
    backward_workspace,
    first_norm_bytes,
    forward_workspace,
    mask_bytes,
    norm_workspace,
    rotary_bytes,
    saved_by_layer,
)
from qrosa.planner.workload import Workload

MIB = 2**20
# Estimates, not formulas; everything else here is arithmetic.
NCCL = 512 * MIB  # buffers that several processes, or DeepSpeed alone, talk through: an upper guess, not measured
# What torch's allocator reserves over its tensors, with expandable segments: of what comes and goes, or of all where
# that is more, most where layers are recomputed; and the pages at the ends of its two pools. From a model of the
# allocator (bench/replay.py), not yet from a card.
ALLOCATOR_SLACK, ALLOCATOR_SHARE, RECOMPUTING_SHARE, ALLOCATOR_PAGES = 0.03, 0.02, 0.04, 100 * MIB
LIVE_BOUNDARIES = 2  # with activation offload: the one in use, and the one on its way out or back
EVAL_CHUNK = 256  # positions whose logits exist at once in evaluation

OVERHEAD = ("cuda_context", "cublas_workspace", "nccl", "allocator_slack")  # components that are no tensors

Components = dict[str, int]


@dataclass(frozen=True)
class PhaseMemory:
    """A phase at its peak.

    Attributes:
        device: Component -> bytes on the device that computes.
        host: Component -> bytes in host memory beside it.
        disk: Bytes on disk that the phase writes.
        moment: When the peak comes, in words.
        passing: Bytes on the device that come and go around the peak.
        coming: On the CPU, bytes that may come from one look at the heap to the next (``qrosa.heap``).
    """

    device: Components
    host: Components
    disk: int = 0
    moment: str = ""
    passing: int = 0
    coming: int = 0

    @property
    def device_total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def tensor_total(self) -> int:
        """Bytes of the tensors on the device alone: what a simulation counts."""
        return sum(size for component, size in self.device.items() if component not in OVERHEAD)

    @property
    def host_total(self) -> int:
        """Bytes in host memory beside the device's."""
        return sum(self.host.values())


@dataclass(frozen=True)
class Moment:
    """Components that are there at once: those that last through the phase, and those that pass."""

    name: str
    lasting: Components
    passing: Components = field(default_factory=dict)

    def components(self, work: Workload) -> Components:
        """All components with the device's own costs; those of 0 bytes are left out."""
        tensors = {**self.lasting, **self.passing}
        made = {**tensors, **_overhead(work), "allocator_slack": 0 if work.on_cpu else self._slack(work.checkpointing)}
        return {name: size for name, size in made.items() if size}

    def _slack(self, recomputing: bool) -> int:
        """What the allocator reserves beside the moment's tensors."""
        passing = sum(self.passing.values())
        of_all = allocator_share(recomputing) * (passing + sum(self.lasting.values()))
        share = max(ALLOCATOR_SLACK * passing, of_all)
        return round(share) + ALLOCATOR_PAGES


def allocator_share(recomputing: bool) -> float:
    """What the allocator reserves beside all tensors, as a share of them."""
    return RECOMPUTING_SHARE if recomputing else ALLOCATOR_SHARE


def _overhead(work: Workload) -> Components:
    """What the process takes of a card beside tensors."""
    if work.on_cpu:
        return {}
    talking = work.processes > 1 or work.zero is not None
    return {
        "cuda_context": work.overhead.context,
        "cublas_workspace": work.overhead.workspace,
        "nccl": NCCL if talking else 0,
    }


def micro_batch(work: Workload, tokens: int, rows: int) -> MicroBatch:
    """A micro-batch of a run's longest rows, padded."""
    window = work.shape.dims.sliding_window
    split = work.deterministic and not work.on_cpu
    return MicroBatch(tokens, work.length, rows, 0 < window <= work.length, work.widens, split)


def training_micro_batch(work: Workload) -> MicroBatch:
    """The largest micro-batch that is trained on, padded or packed."""
    return replace(micro_batch(work, work.tokens, work.rows), packed=work.packed)


def boundary_bytes(work: Workload, tokens: int) -> int:
    """The hidden state before each decoder layer, bf16 [T, d]."""
    return HALF * tokens * work.shape.dims.hidden * work.shape.dims.layers


def scratch_bytes(work: Workload) -> int:
    """The dense weight [N, K] of the largest matrix where it stays between calls: on the CPU, in what it multiplies."""
    return (FULL if work.widens else HALF) * parts.largest(work.shape.linears) if work.on_cpu else 0


def backward_moments(
    work: Workload,
    batch: MicroBatch,
    lasting: Components,
    micro_batch_gradients: int,
    layers: int,
) -> list[Moment]:
    """The places where a forward and backward pass can peak that ends ``layers`` below the head."""
    dims = work.shape.dims
    recomputed, saved = _saved(work, batch, layers)
    # Kept for recomputation only: neither adding a mask nor making one of another dtype saves it.
    masks = mask_bytes(dims, batch, work.attention) if work.checkpointing else 0
    lasting = lasting | {"scratch": scratch_bytes(work)}
    workspace = backward_workspace(dims, batch, work.attention, work.on_cpu)
    held = {"activations": saved, "masks": masks}
    weights = FULL * batch.tokens if work.goal.compares else 0  # what each position's loss counts
    moments = [
        Moment(
            "computing the loss",
            lasting,
            held | {"loss": parts.loss_bytes(dims, batch.tokens, work.loss_chunk_tokens, work.widens) + weights},
        ),
        Moment("backward through the final norm", lasting, held | {"workspace": norm_workspace(dims, batch)}),
        Moment(
            "backward through the last layer",
            lasting,
            held | {"activations": saved + recomputed, "workspace": workspace},
        ),
    ]
    if work.checkpointing:
        # The second layer: the first saves less, as its first norm reads the embeddings.
        late = {
            "activations": min(layers, 2) * _boundary(work, batch) + recomputed + rotary_bytes(dims, batch),
            "masks": masks,
            "workspace": workspace,
            "micro_batch_gradients": micro_batch_gradients * max(0, layers - 2) // layers,
        }
        moments.append(Moment("backward through the first layers", lasting, late))
    return moments


def _saved(work: Workload, batch: MicroBatch, layers: int) -> tuple[int, int]:
    """What one layer saves again when it is recomputed, and what ``layers`` layers save in the forward pass."""
    dims = work.shape.dims
    if work.checkpointing:
        kept = min(layers, LIVE_BOUNDARIES) if work.offload_activations else layers
        return recomputed_bytes(work, batch), kept * _boundary(work, batch) + rotary_bytes(dims, batch)
    mean_rank = sum(_rank_sums(work).values()) / dims.layers
    saved = layers * sum(saved_by_layer(dims, batch, work.attention, mean_rank).values())
    saved += layers * sum(_made_factors(work).values()) // dims.layers
    # The first norm reads the embeddings, which need no gradient.
    return 0, saved - first_norm_bytes(dims, batch) + rotary_bytes(dims, batch)


def recomputed_bytes(work: Workload, batch: MicroBatch) -> int:
    """What the layer with the most low-rank parameters saves beside its input, which is kept all the time."""
    saved = sum(saved_by_layer(work.shape.dims, batch, work.attention, max(_rank_sums(work).values())).values())
    saved += max(_made_factors(work).values())
    return saved if work.shape.dims.counted is not None else saved - HALF * batch.tokens * work.shape.dims.hidden


def _rank_sums(work: Workload) -> dict[int, int]:
    """Layer -> sum of the ranks of its matrices."""
    ranks: dict[int, int] = {}
    for linear in work.allocation.linears:
        ranks[linear.layer] = ranks.get(linear.layer, 0) + work.allocation.ranks[linear.path]
    return ranks


def _made_factors(work: Workload) -> dict[int, int]:
    """Layer -> bytes of the factors that its low-rank parts make of their tensors and keep for backward."""
    form = form_named(work.allocation.form)
    made: dict[int, int] = {}
    for linear in work.allocation.linears:
        rank = work.allocation.ranks[linear.path]
        size = HALF * form.made(linear.out_features, linear.in_features, rank) if rank else 0
        made[linear.layer] = made.get(linear.layer, 0) + size
    return made


def _boundary(work: Workload, batch: MicroBatch) -> int:
    return HALF * batch.tokens * work.shape.dims.hidden


def forward_moments(
    work: Workload, batch: MicroBatch, lasting: Components, chunk_tokens: int = EVAL_CHUNK
) -> list[Moment]:
    """The places where a forward pass without gradients can peak: evaluation, and scoring of answers in a step."""
    dims = work.shape.dims
    lasting = lasting | {"scratch": scratch_bytes(work)}
    workspace = forward_workspace(dims, batch, work.attention, work.on_cpu) + rotary_bytes(dims, batch)
    loss = parts.eval_loss_bytes(dims, batch.tokens, chunk_tokens)
    return [
        Moment("a layer", lasting, {"workspace": workspace, "masks": mask_bytes(dims, batch, work.attention)}),
        Moment("computing the loss", lasting, {"loss": loss}),
    ]
