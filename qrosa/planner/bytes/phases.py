"""Peak memory of every phase of a run, by component: which tensors are there, and when they meet.

A phase is what lasts through it (``resident``) and the moments at which more comes (``moments``); what a component
takes is in ``parts`` and ``activations``, what the process takes beside its tensors in ``host``.
"""

from __future__ import annotations

from dataclasses import replace

from qrosa.optim.kinds import OPTIMIZERS
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes import zero as deepspeed
from qrosa.planner.bytes.activations import FULL, HALF
from qrosa.planner.bytes.calibration import (
    IMPORTANCE_ROWS,
    MICRO_BATCH,
    SCORE_TOKENS,
    WINDOW,
    WINDOWS,
    calibration_bytes,
)
from qrosa.planner.bytes.host import CPU_RUNTIME, EXPORT_BUFFER, process_bytes
from qrosa.planner.bytes.kept import layer_bytes, with_kept_heap
from qrosa.planner.bytes.peaks import (
    Components,
    Moment,
    PhaseMemory,
    backward_moments,
    boundary_bytes,
    forward_moments,
    micro_batch,
    scratch_bytes,
    training_micro_batch,
)
from qrosa.planner.workload import Workload


def phases(work: Workload) -> dict[str, PhaseMemory]:
    """Every phase that the run has, in order: quantise (where the run makes its base), load, select (unless nothing is
    selected), train, eval, save, export."""
    found = {"quantise": _quantise(work)} if work.feedback else {}
    found["load"] = _load(work)
    if work.allocation.nnz_total or work.rank_by == "sensitivity":
        found["select"] = _selecting(work)
    found |= {"train": _train(work), "eval": _eval(work), "save": _save(work), "export": _export(work)}
    return with_kept_heap(work, found) if work.on_cpu else found


def selection(work: Workload) -> PhaseMemory:
    """The phase ``select`` alone; searches ask for it often."""
    found = {"select": _selecting(work)}
    return (with_kept_heap(work, found) if work.on_cpu else found)["select"]


def _selecting(work: Workload) -> PhaseMemory:
    """Masks are picked, ranks are measured before that, or both: the larger of the two."""
    found = [_select(work)] if work.allocation.nnz_total else []
    if work.rank_by == "sensitivity":
        found.append(_measure(work))
    return max(found, key=lambda memory: memory.device_total + memory.host_total)


def _peak(
    work: Workload, moments: list[Moment], host: Components | None = None, disk: int = 0, *, loading: bool = False
) -> PhaseMemory:
    highest = max(moments, key=lambda moment: sum(moment.components(work).values()))
    made = process_bytes(work, loading=loading) | (host or {})
    kept = {component: size for component, size in made.items() if size}
    return PhaseMemory(highest.components(work), kept, disk, highest.name, sum(highest.passing.values()))


def _resident(work: Workload, *, low_rank: bool = True, sparse: bool = True) -> Components:
    """What stays on the device between steps: base, adapter, flat gradients, optimizer."""
    low = work.allocation.low_rank_parameters if low_rank else 0
    high = work.allocation.sparse_parameters if sparse else 0
    adapter = (parts.low_rank_bytes(work.allocation) if low_rank else 0) + (
        parts.sparse_bytes(work.allocation) if sparse else 0
    )
    optimizer = 0 if _is_paged(work) else parts.optimizer_bytes(low, high, work.optimizer)
    return {
        "base": _device_base(work),
        "unquantised": parts.unquantised_bytes(work.shape),
        "adapter": adapter,
        "gradients": parts.flat_gradient_bytes(low, high),
    } | ({"optimizer": optimizer} if work.zero is None else deepspeed.resident_bytes(work, low, high))


def _device_base(work: Workload) -> int:
    """Packed bytes on the device: all of the base, or the part that streaming keeps there."""
    if work.resident_blocks is None:
        return parts.base_bytes(work.shape)
    return parts.streamed_base_bytes(work.shape, work.resident_blocks)


def traffic(work: Workload) -> dict[str, int]:
    """Bytes that cross to and from the device in a training step of one micro-batch, by what crosses.

    A streamed block comes once for the forward pass and once for recomputation and backward, but for the slots that the
    turn-around finds filled, and once for each of the passes that score answers. A boundary goes out and comes back.
    """
    crossing = {}
    if work.resident_blocks is not None:
        streamed = work.shape.dims.layers - work.resident_blocks
        turns = max(0, 2 * streamed - parts.STREAM_SLOTS) + work.goal.passes * streamed
        crossing["base"] = turns * parts.block_bytes(work.shape)
    if work.offload_activations:
        crossing["activations"] = 2 * boundary_bytes(work, work.tokens)
    return crossing


def _is_paged(work: Workload) -> bool:
    return OPTIMIZERS[work.optimizer].paged and not work.on_cpu


def _quantise(work: Workload) -> PhaseMemory:
    """The run's base is made: on the 4-bit model tokens are weighed and losses measured, the 16-bit one passes once."""
    passing = calibration_bytes(
        work.shape, WINDOWS, WINDOW, MICRO_BATCH, sparse=False, low_rank=False, on_card=not work.on_cpu
    )
    lasting = {name: passing[name] for name in ("unquantised", "hidden", "moments")}
    moments = [Moment("rounding a block", lasting, {name: passing[name] for name in ("block", "workspace")})]
    held = {"base": parts.base_bytes(work.shape), "unquantised": passing["unquantised"]}
    widen = 2 if work.on_cpu else 1  # computed in fp32 there
    for moment in forward_moments(work, micro_batch(work, SCORE_TOKENS, 0), held):
        moments.append(replace(moment, passing={name: widen * size for name, size in moment.passing.items()}))
    moments += _weighing(work, WINDOW)
    largest = max(parts.largest(work.shape.linears), *work.shape.unquantised.values())
    disk = parts.base_bytes(work.shape) + parts.unquantised_bytes(work.shape)
    layer = widen * layer_bytes(work, micro_batch(work, IMPORTANCE_ROWS * WINDOW, IMPORTANCE_ROWS))
    memory = _peak(work, moments, {"staging": work.shape.stored_bytes * largest}, disk)
    return replace(memory, coming=max(passing["workspace"], layer))


def _weighing(work: Workload, length: int) -> list[Moment]:
    """Forward and back through the 4-bit model, every activation kept."""
    widen = 2 if work.on_cpu else 1
    held = {"base": parts.base_bytes(work.shape), "unquantised": widen * parts.unquantised_bytes(work.shape)}
    whole = replace(work, checkpointing=False, offload_activations=False)
    windows = micro_batch(whole, IMPORTANCE_ROWS * length, IMPORTANCE_ROWS)
    found = backward_moments(whole, windows, held, 0, work.shape.dims.layers)
    return [replace(m, passing={name: widen * size for name, size in m.passing.items()}) for m in found]


def weighing_bytes(work: Workload, length: int) -> int:
    """On the device at the peak, beside what a process takes anyway, while calibration windows' tokens are weighed."""
    return max(sum(moment.components(work).values()) for moment in _weighing(work, length))


def _load(work: Workload) -> PhaseMemory:
    """Matrices are quantised one by one, then the rest is read: the last matrix, or the last embedding, is the peak."""
    base, rest = _device_base(work), parts.unquantised_bytes(work.shape)
    matrix, stored = parts.largest(work.shape.linears), work.shape.stored_bytes
    reading = 0 if work.shape.kind == "nf4" else parts.quantise_bytes(matrix, stored, work.on_cpu)
    widest = max(work.shape.unquantised.values(), default=0)
    converting = stored * widest if stored != HALF else 0
    staging = stored * max(matrix, widest) * (2 if work.shape.kind == "gguf" else 1)
    moments = [
        Moment("quantising the largest matrix", {"base": base}, {"quantising": reading}),
        Moment("reading the largest embedding", {"base": base, "unquantised": rest}, {"quantising": converting}),
    ]
    moments += _svd_moments(work)
    # Bytes of the checkpoint's memory-mapped file count as this process's while a tensor is copied out of it.
    return _peak(work, moments, {"staging": staging}, loading=True)


def _svd_moments(work: Workload) -> list[Moment]:
    """Starting the low-rank part at the quantisation error: rows weigh the inputs, then errors are decomposed."""
    if work.low_rank_init != "svd" or not work.allocation.low_rank_parameters or not work.has_original:
        return []
    lasting = {
        "base": _device_base(work),
        "unquantised": parts.unquantised_bytes(work.shape),
        "adapter": parts.low_rank_bytes(work.allocation),
        "input_weights": FULL * sum(linear.in_features for linear in work.shape.linears),
    }
    layer, _ = forward_moments(work, micro_batch(work, work.length, 1), lasting)
    squared = 2 * FULL * work.length * max(linear.in_features for linear in work.shape.linears)
    rank = max(work.allocation.ranks.values())
    decomposing = max(parts.error_bytes(work.shape), parts.factor_bytes(work.shape, rank))
    return [
        Moment("weighing the inputs", layer.lasting, layer.passing | {"squared_inputs": squared}),
        Moment("decomposing the largest error", lasting, {"factors": decomposing}),
    ]


def _select(work: Workload) -> PhaseMemory:
    """Samples pass one by one, without dropout, while the statistics of a group of matrices stand."""
    lasting = _resident(work, sparse=False)
    disk, host = 0, {"positions": 8 * work.allocation.nnz_total} | _host_optimizer(work, sparse=False)
    if work.offload_activations:
        host["pinned_activations"] = _host_boundaries(work, work.length)
    dense = parts.error_bytes(work.shape)
    starts = []
    if work.sparse_init == "residual" and work.has_original:
        starts = [Moment("reading where values start", lasting, {"scores": dense})]
    score = work.score
    if score.rank is None:
        return _peak(work, [Moment("drawing positions", lasting), *starts], host, disk)
    if not score.reads_gradients:
        return _peak(work, [*_picking(work, lasting), *starts], host, disk)
    if work.mask_scope == "global":
        host["candidates"] = 3 * 12 * work.allocation.nnz_total
    if work.mask_candidates:
        return _peak(work, [*_streaming(work, lasting), *starts], host, disk)
    sizes = parts.observed(work.allocation, work.mask_scope)
    sample, moments = micro_batch(work, work.length, 1), starts
    for group in parts.statistic_groups(work.allocation, work.mask_scope, work.mask_group_bytes):
        lasting = lasting | {"mask_statistics": parts.statistic_bytes(sizes, group)}
        layers = work.shape.dims.layers - min(x.layer for x in work.allocation.linears if x.path in group)
        moments += backward_moments(work, sample, lasting, 0, layers)
    moments += _picking(work, lasting)
    return _peak(work, moments, host, disk)


def _streaming(work: Workload, lasting: Components) -> list[Moment]:
    """One pass through all layers. A gradient is looked at before the layer's own backward: beside dY, bf16 [T, d]."""
    lasting = lasting | {"mask_statistics": parts.candidate_bytes(work)}
    looking = parts.looking_bytes(work) + HALF * work.length * work.shape.dims.hidden
    moments = _picking(work, lasting)
    for moment in backward_moments(work, micro_batch(work, work.length, 1), lasting, 0, work.shape.dims.layers):
        passing = moment.passing
        if "layer" in moment.name:
            passing = passing | {"workspace": max(looking, passing["workspace"])}
        moments.append(replace(moment, passing=passing))
    return moments


def _picking(work: Workload, lasting: Components) -> list[Moment]:
    """A matrix's statistic, its quantisation error, or both become scores, and the best of them are picked."""
    scores = FULL * work.score.scratch * parts.largest(work.shape.linears)
    moments = [Moment("picking positions", lasting, {"scores": scores, "top_k": parts.top_k_bytes(work.allocation)})]
    if work.score.reads_error:
        moments.append(Moment("reading an error", lasting, {"scores": parts.error_bytes(work.shape)}))
    return moments


def _measure(work: Workload) -> PhaseMemory:
    """Samples pass one by one through the base, before it has an adapter, and each matrix's gradient is measured."""
    lasting = {"base": _device_base(work), "unquantised": parts.unquantised_bytes(work.shape)}
    host = {"pinned_activations": _host_boundaries(work, work.length)} if work.offload_activations else None
    sample, layers = micro_batch(work, work.length, 1), work.shape.dims.layers
    norms = {"gradient_norms": parts.gram_bytes(work.shape, work.length)}
    moments = backward_moments(work, sample, lasting, 0, layers)
    return _peak(work, [replace(moment, passing=moment.passing | norms) for moment in moments], host)


def _train(work: Workload) -> PhaseMemory:
    """Joint training: micro-batches of the longest rows."""
    allocation = work.allocation
    gradients = parts.micro_batch_gradient_bytes(allocation.low_rank_parameters, allocation.sparse_parameters)
    batch = training_micro_batch(work)
    moments = backward_moments(work, batch, _resident(work), gradients, work.shape.dims.layers)
    if work.goal.compares:
        moments += forward_moments(work, batch, _resident(work), work.loss_chunk_tokens)
    if work.zero is None:
        moments.append(Moment("the optimizer step", _resident(work), {"micro_batch_gradients": gradients}))
    else:
        low, high = allocation.low_rank_parameters, allocation.sparse_parameters
        moments.append(Moment("the optimizer step", _resident(work), {"update": deepspeed.step_bytes(work, low, high)}))
    host = _host_optimizer(work)
    if work.offload_activations:
        host["pinned_activations"] = _host_boundaries(work, work.tokens)
    return _peak(work, moments, host)


def _host_boundaries(work: Workload, tokens: int) -> int:
    """Offloaded boundaries in host memory, a buffer for each layer."""
    size, layers = boundary_bytes(work, tokens), work.shape.dims.layers
    return size if work.on_cpu else layers * parts.pinned_bytes(size // layers)


def _host_optimizer(work: Workload, *, sparse: bool = True) -> Components:
    """Optimizer states in host memory: offloaded by DeepSpeed, paged, or the outer step's.

    Paged ones are in unified memory: they move to the card while they are used and leave it under pressure.
    """
    low, high = work.allocation.low_rank_parameters, work.allocation.sparse_parameters if sparse else 0
    if work.zero is not None:
        return deepspeed.host_bytes(work, low, high)
    return {
        "paged_optimizer": parts.optimizer_bytes(low, high, work.optimizer) if _is_paged(work) else 0,
        "outer_step": parts.outer_bytes(low, high) if work.sync_every > 1 else 0,
    }


def _eval(work: Workload) -> PhaseMemory:
    """Forward passes while training's state stays where it is."""
    batch = micro_batch(work, max(work.eval_tokens, work.length), 0)
    moments = forward_moments(work, batch, _resident(work))
    if work.samples:
        row = micro_batch(replace(work, length=work.answered_length), work.answered_length, 1)
        moments += forward_moments(work, row, _resident(work) | {"cache": _cache_bytes(work)})
    return _peak(work, moments, _host_optimizer(work))


def _cache_bytes(work: Workload) -> int:
    """Keys and values of one row while it is answered, and of one layer while they are made longer by a token."""
    dims = work.shape.dims
    return 2 * HALF * work.answered_length * dims.key_width * (dims.layers + 1)


def _state_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of an adapter, and of an optimizer's masters and states, as they are saved."""
    allocation = work.allocation
    adapter = parts.low_rank_bytes(allocation) + parts.sparse_bytes(allocation)
    low, high = allocation.low_rank_parameters, allocation.sparse_parameters
    velocity = FULL * (low + high) if work.sync_every > 1 else 0
    return adapter, parts.optimizer_bytes(low, high, work.optimizer) + FULL * high + velocity


def _save(work: Workload) -> PhaseMemory:
    """A checkpoint: adapter and optimizer copied to the host, and once more as the bytes of a file."""
    adapter, optimizer = _state_bytes(work)
    host = {"state": adapter + optimizer, "file": max(adapter, optimizer)} | _host_optimizer(work)
    disk = (work.checkpoints + 1) * (adapter + optimizer) + adapter
    lasting = _resident(work) | {"scratch": scratch_bytes(work)}
    return _peak(work, [Moment("copying the state", lasting)], host, disk)


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
