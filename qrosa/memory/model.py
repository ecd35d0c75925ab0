"""Peak memory of every phase of a run, by component.

A phase passes through *moments* at which it may peak: training, for one, at the loss, where all saved activations meet
the logits, or at the first layer of backward, where they meet that layer's workspace. Each moment is a sum of
components; a phase's figures are those of its highest moment, so components add up to the total exactly, and
tensors that never meet are not added. Adding up each component's own peak would be simpler and some 10% too high.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qrosa.adapters.budget import Allocation
from qrosa.memory import parts
from qrosa.memory.activations import (
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
from qrosa.memory.shape import ModelShape

MIB = 2**20
# Estimates, not formulas; everything else here is arithmetic.
CUDA_CONTEXT = 512 * MIB  # driver context and loaded kernels; 350 to 600 MiB have been seen, by card and driver
CUBLAS_WORKSPACE = 32 * MIB  # what torch gives cuBLAS on Hopper; 8 MiB elsewhere
ALLOCATOR_SLACK = 0.03  # of what comes and goes: blocks that are cached, rounded up or split
CPU_RUNTIME = 480 * MIB  # resident Python, torch, transformers, bitsandbytes and datasets, measured on Linux x86-64
# What the C library keeps of freed tensors while a phase runs on the CPU: resident sizes of SmolLM2 runs less the bytes
# of their tensors, over six settings: some 200 MiB and 0.55 to 0.72 of what came and went, more where little did.
KEPT_HEAP, KEPT_SHARE = 256 * MIB, 0.65
CUDA_RUNTIME = 2048 * MIB  # the same with a CUDA build and its context's host side
EXPORT_BUFFER = 64 * MIB  # the writer's
LIVE_BOUNDARIES = 2  # with activation offload: the one in use, and the one on its way out or back
EVAL_CHUNK = 256  # positions whose logits exist at once in evaluation

OVERHEAD = ("cuda_context", "cublas_workspace", "allocator_slack")  # components that are no tensors

GRADIENT_SCORES = ("squared", "mean", "repair")
Components = dict[str, int]


@dataclass(frozen=True)
class Workload:
    """A run as far as memory depends on it.

    Attributes:
        shape: The base.
        allocation: Where the trained parameters are.
        device: ``cuda`` or ``cpu``.
        attention: ``sdpa`` or ``eager``.
        optimizer: Name of the optimizer.
        dropout: Of the low-rank part.
        mask_score: What ranks positions.
        mask_scope: ``matrix`` or ``global``.
        length: Longest row in tokens.
        rows: Most rows of a micro-batch.
        tokens: Most tokens of a micro-batch.
        eval_tokens: The same in evaluation.
        checkpointing: Activations are recomputed.
        loss_chunk_tokens: Positions whose logits exist at once.
        mask_group_bytes: Bound on the statistics that are collected together.
        checkpoints: Checkpoints on disk at once.
        offload_activations: Boundary activations are kept on the host.
        resident_blocks: Decoder blocks of the base that stay on the device; None where it is not streamed.
        base_on_disk: A streamed base is mapped from files.
    """

    shape: ModelShape
    allocation: Allocation
    device: str
    attention: str
    optimizer: str
    dropout: float
    mask_score: str
    mask_scope: str
    length: int
    rows: int
    tokens: int
    eval_tokens: int
    checkpointing: bool
    loss_chunk_tokens: int
    mask_group_bytes: int
    checkpoints: int
    offload_activations: bool = False
    resident_blocks: int | None = None
    base_on_disk: bool = False

    @property
    def streamed(self) -> bool:
        """The base visits the device block by block."""
        return self.resident_blocks is not None

    @property
    def on_cpu(self) -> bool:
        """Device and host are the same memory."""
        return self.device == "cpu"


@dataclass(frozen=True)
class PhaseMemory:
    """A phase at its peak.

    Attributes:
        device: Component -> bytes on the device that computes.
        host: Component -> bytes in host memory beside it.
        disk: Bytes on disk that the phase writes.
        moment: When the peak comes, in words.
    """

    device: Components
    host: Components
    disk: int = 0
    moment: str = ""

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
class _Moment:
    name: str
    lasting: Components
    passing: Components = field(default_factory=dict)

    def components(self, work: Workload) -> Components:
        """All components with the device's own costs; those of 0 bytes are left out."""
        slack = round(ALLOCATOR_SLACK * sum(self.passing.values()))
        overhead = {} if work.on_cpu else {"cuda_context": CUDA_CONTEXT, "cublas_workspace": CUBLAS_WORKSPACE}
        made = {**self.lasting, **self.passing, **overhead, "allocator_slack": slack}
        return {name: size for name, size in made.items() if size}


def phases(work: Workload) -> dict[str, PhaseMemory]:
    """Every phase that the run has, in order: load, select (unless nothing is selected), train, eval, save, export."""
    found = {"load": _load(work)}
    if work.allocation.nnz_total:
        found["select"] = _select(work)
    return found | {"train": _train(work), "eval": _eval(work), "save": _save(work), "export": _export(work)}


def _peak(work: Workload, moments: list[_Moment], host: Components | None = None, disk: int = 0) -> PhaseMemory:
    made = [(moment.components(work), moment.name) for moment in moments]
    device, name = max(made, key=lambda item: sum(item[0].values()))
    runtime = {"runtime": CPU_RUNTIME if work.on_cpu else CUDA_RUNTIME}
    if work.streamed and not work.base_on_disk:
        runtime["pinned_base"] = work.shape.dims.layers * parts.block_bytes(work.shape)
    if work.on_cpu:
        passing = next(sum(moment.passing.values()) for moment in moments if moment.name == name)
        runtime["kept_heap"] = KEPT_HEAP + round(KEPT_SHARE * passing)
    kept = {component: size for component, size in (host or {}).items() if size}
    return PhaseMemory(device, runtime | kept, disk, name)


def _resident(work: Workload, *, low_rank: bool = True, sparse: bool = True) -> Components:
    """What stays on the device between steps: base, adapter, flat gradients, optimizer."""
    low = work.allocation.low_rank_parameters if low_rank else 0
    high = work.allocation.sparse_parameters if sparse else 0
    adapter = (parts.low_rank_bytes(work.allocation) if low_rank else 0) + (
        parts.sparse_bytes(work.allocation) if sparse else 0
    )
    return {
        "base": _device_base(work),
        "unquantised": parts.unquantised_bytes(work.shape),
        "adapter": adapter,
        "gradients": parts.flat_gradient_bytes(low, high),
        "optimizer": 0 if _paged(work) else parts.optimizer_bytes(low, high, work.optimizer),
    }


def _device_base(work: Workload) -> int:
    """Packed bytes on the device: all of the base, or the part that streaming keeps there."""
    if work.resident_blocks is None:
        return parts.base_bytes(work.shape)
    return parts.streamed_base_bytes(work.shape, work.resident_blocks)


def traffic(work: Workload) -> dict[str, int]:
    """Bytes that cross to and from the device in a training step of one micro-batch, by what crosses.

    A streamed block comes once for the forward pass and once for recomputation and backward, but for the slots that the
    turn-around finds filled. A boundary goes out and comes back.
    """
    crossing = {}
    if work.resident_blocks is not None:
        streamed = work.shape.dims.layers - work.resident_blocks
        turns = max(0, 2 * streamed - parts.STREAM_SLOTS)
        crossing["base"] = turns * parts.block_bytes(work.shape)
    if work.offload_activations:
        crossing["activations"] = 2 * _boundaries(work, work.tokens)
    return crossing


def _boundaries(work: Workload, tokens: int) -> int:
    """The hidden state before each decoder layer, bf16 [T, d]."""
    return HALF * tokens * work.shape.dims.hidden * work.shape.dims.layers


def _paged(work: Workload) -> bool:
    return work.optimizer.startswith("paged") and not work.on_cpu


def _scratch(work: Workload) -> int:
    """The dense weight, bf16 [N, K] of the largest matrix, where it stays between calls: on the CPU."""
    return HALF * parts.largest(work.shape.linears) if work.on_cpu else 0


def _load(work: Workload) -> PhaseMemory:
    """Matrices are quantised one by one, then the rest is read: the last matrix, or the last embedding, is the peak."""
    base, rest = _device_base(work), parts.unquantised_bytes(work.shape)
    matrix, stored = parts.largest(work.shape.linears), work.shape.stored_bytes
    reading = 0 if work.shape.kind == "nf4" else parts.quantise_bytes(matrix, stored, work.on_cpu)
    widest = max(work.shape.unquantised.values(), default=0)
    converting = stored * widest if stored != HALF else 0
    staging = stored * max(matrix, widest) * (2 if work.shape.kind == "gguf" else 1)
    moments = [
        _Moment("quantising the largest matrix", {"base": base}, {"quantising": reading}),
        _Moment("reading the largest embedding", {"base": base, "unquantised": rest}, {"quantising": converting}),
    ]
    # Bytes of the checkpoint's memory-mapped file count as this process's while a tensor is copied out of it.
    return _peak(work, moments, {"staging": staging})


def _batch(work: Workload, tokens: int, rows: int) -> MicroBatch:
    window = work.shape.dims.sliding_window
    return MicroBatch(tokens, work.length, rows, windowed=0 < window <= work.length)


def _backward_moments(
    work: Workload,
    batch: MicroBatch,
    lasting: Components,
    dropout: float,
    micro_batch_gradients: int,
    layers: int,
) -> list[_Moment]:
    """The places where a forward and backward pass can peak that ends ``layers`` below the head."""
    dims = work.shape.dims
    ranks: dict[int, int] = {}
    for linear in work.allocation.linears:
        ranks[linear.layer] = ranks.get(linear.layer, 0) + work.allocation.ranks[linear.path]
    mean_rank = sum(ranks.values()) / dims.layers
    one = sum(saved_by_layer(dims, batch, work.attention, max(ranks.values())).values())
    boundary = HALF * batch.tokens * dims.hidden
    kept = min(layers, LIVE_BOUNDARIES) if work.offload_activations else layers
    saved = kept * (boundary if work.checkpointing else 0) or layers * sum(
        saved_by_layer(dims, batch, work.attention, mean_rank).values()
    )
    if not work.checkpointing:
        # The first norm reads the embeddings, which need no gradient.
        saved -= first_norm_bytes(dims, batch)
    saved += rotary_bytes(dims, batch)
    recomputed = one if work.checkpointing else 0
    # Kept for recomputation only: neither adding a mask nor making one of another dtype saves it.
    masks = mask_bytes(dims, batch, work.attention) if work.checkpointing else 0
    lasting = lasting | {"scratch": _scratch(work)}
    workspace = backward_workspace(dims, batch, work.attention, dropout, work.on_cpu)
    loss = parts.loss_bytes(dims, batch.tokens, work.loss_chunk_tokens)
    moments = [
        _Moment("computing the loss", lasting, {"activations": saved, "masks": masks, "loss": loss}),
        _Moment(
            "backward through the final norm",
            lasting,
            {"activations": saved, "masks": masks, "workspace": norm_workspace(dims, batch)},
        ),
        _Moment(
            "backward through the last layer",
            lasting,
            {"activations": saved + recomputed, "masks": masks, "workspace": workspace},
        ),
    ]
    if work.checkpointing:
        # The second layer: the first saves less, as its first norm reads the embeddings.
        late = {
            "activations": min(layers, 2) * boundary + recomputed + rotary_bytes(dims, batch),
            "masks": masks,
            "workspace": workspace,
            "micro_batch_gradients": micro_batch_gradients * max(0, layers - 2) // layers,
        }
        moments.append(_Moment("backward through the first layers", lasting, late))
    return moments


def _select(work: Workload) -> PhaseMemory:
    """Samples pass one by one, without dropout, while the statistics of a group of matrices stand."""
    lasting = _resident(work, sparse=False)
    disk, host = 0, {"positions": 8 * work.allocation.nnz_total}
    if work.offload_activations:
        host["pinned_activations"] = _boundaries(work, work.length)
    if work.mask_score == "random":
        return _peak(work, [_Moment("drawing positions", lasting)], host, disk)
    dense = (2 * FULL + work.shape.stored_bytes) * parts.largest(work.shape.linears)  # an error while it is read
    top_k = parts.top_k_bytes(work.allocation)
    if work.mask_score == "residual":
        return _peak(work, [_Moment("reading an error", lasting, {"scores": max(dense, top_k)})], host, disk)
    sizes = parts.observed(work.allocation, work.mask_scope)
    sample, moments = _batch(work, work.length, 1), []
    for group in parts.statistic_groups(work.allocation, work.mask_scope, work.mask_group_bytes):
        lasting = lasting | {"mask_statistics": parts.statistic_bytes(sizes, group)}
        layers = work.shape.dims.layers - min(x.layer for x in work.allocation.linears if x.path in group)
        moments += _backward_moments(work, sample, lasting, 0.0, 0, layers)
    moments.append(_Moment("picking positions", lasting, {"top_k": top_k}))
    if work.mask_score == "repair":
        moments.append(_Moment("reading an error", lasting, {"scores": dense}))
    if work.mask_scope == "global":
        host["candidates"] = 3 * 12 * work.allocation.nnz_total
    return _peak(work, moments, host, disk)


def _train(work: Workload) -> PhaseMemory:
    """Joint training: micro-batches of the longest rows."""
    allocation = work.allocation
    gradients = parts.micro_batch_gradient_bytes(allocation.low_rank_parameters, allocation.sparse_parameters)
    batch = _batch(work, work.tokens, work.rows)
    moments = _backward_moments(work, batch, _resident(work), work.dropout, gradients, work.shape.dims.layers)
    moments.append(_Moment("the optimizer step", _resident(work), {"micro_batch_gradients": gradients}))
    host = {"paged_optimizer": _paged_bytes(work)}
    if work.offload_activations:
        host["pinned_activations"] = _boundaries(work, work.tokens)
    return _peak(work, moments, host)


def _paged_bytes(work: Workload) -> int:
    """Optimizer states in unified memory: they move to the card while they are used and leave it under pressure."""
    allocation = work.allocation
    if not _paged(work):
        return 0
    return parts.optimizer_bytes(allocation.low_rank_parameters, allocation.sparse_parameters, work.optimizer)


def _eval(work: Workload) -> PhaseMemory:
    """Forward passes while training's state stays where it is."""
    batch = _batch(work, max(work.eval_tokens, work.length), 0)
    dims, masks = work.shape.dims, mask_bytes(work.shape.dims, batch, work.attention)
    lasting = _resident(work) | {"scratch": _scratch(work)}
    workspace = forward_workspace(dims, batch, work.attention, work.on_cpu) + rotary_bytes(dims, batch)
    moments = [
        _Moment("a layer", lasting, {"workspace": workspace, "masks": masks}),
        _Moment("computing the loss", lasting, {"loss": parts.eval_loss_bytes(dims, batch.tokens, EVAL_CHUNK)}),
    ]
    return _peak(work, moments, {"paged_optimizer": _paged_bytes(work)})


def _state_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of an adapter, and of an optimizer's masters and states, as they are saved."""
    allocation = work.allocation
    adapter = parts.low_rank_bytes(allocation) + parts.sparse_bytes(allocation)
    low, high = allocation.low_rank_parameters, allocation.sparse_parameters
    return adapter, parts.optimizer_bytes(low, high, work.optimizer) + FULL * high


def _save(work: Workload) -> PhaseMemory:
    """A checkpoint: adapter and optimizer copied to the host, and once more as the bytes of a file."""
    adapter, optimizer = _state_bytes(work)
    host = {"state": adapter + optimizer, "file": max(adapter, optimizer), "paged_optimizer": _paged_bytes(work)}
    disk = (work.checkpoints + 1) * (adapter + optimizer) + adapter
    lasting = _resident(work) | {"scratch": _scratch(work)}
    return _peak(work, [_Moment("copying the state", lasting)], host, disk)


def _export(work: Workload) -> PhaseMemory:
    """One tensor at a time on the host: quantised again, decoded and merged in fp32, rounded; the device is not used.

    Composition holds the fp32 weight, the packed one and the low-rank product; quantising comes before and is larger.
    """
    matrix, stored = parts.largest(work.shape.linears), work.shape.stored_bytes
    quantising = parts.quantise_bytes(matrix, stored, True) + stored * matrix
    composing = (2 * FULL + HALF + 1) * matrix
    widest = (stored + 2 * HALF) * max(work.shape.unquantised.values(), default=0)
    adapter, _ = _state_bytes(work)
    host = {
        "runtime": CPU_RUNTIME,
        "adapter": adapter,
        "tensor": max(quantising, composing, widest),
        "file": EXPORT_BUFFER,
    }
    return PhaseMemory({}, host, HALF * work.shape.base_parameters, "merging the largest matrix")
