"""What torch's allocator reserves over a run, against the plan: the simulated step's requests through its model.

    python -m bench.replay                       # an 8B model, rows like chats', at 8 and 24 GB

A run is loading, two steps of warm-up, mask selection and two steps with the sparse part, on rows of many lengths, one
of each step's as long as the longest. The requests are those of the real training step under fake tensors
(``qrosa.measure.trace``), the answers those of ``bench.allocator``. Without a card this is the only look at what rows
of many lengths leave of the allocator's blocks; what streams do to them it does not show.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.allocator import Block, Expandable, Segments
from bench.random_checkpoint import SHAPES
from qrosa.adapters.inject import inject_low_rank
from qrosa.base.shape import from_config
from qrosa.config import make_groups
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.encode import EncodedRow
from qrosa.measure.card import CARD_GRANULE, fused_kernels, hidden_bytes
from qrosa.measure.trace import Trace
from qrosa.measure.tracker import FORWARD, UPDATE, StorageTracker
from qrosa.model.modes import set_attention, set_checkpointing
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.planner.hardware import Here
from qrosa.planner.plan import Plan
from qrosa.planner.request import make_request
from qrosa.planner.search.solve import solve
from qrosa.train.step import StepRunner

GB, BATCH, MODEL = 1 << 30, 8, "llama-3.1-8b"
CASES = ((8, 1024, "on"), (24, 4096, "on"), (24, 2048, "off"))  # GB, tokens of the longest row, recomputation
PHASES = ("set-up", "warm-up", "select", "train")


class Recorder(StorageTracker):
    """Keeps every request: (key, bytes) for memory that is taken, (key, -1) for memory that is given back."""

    def __init__(self, split: bool) -> None:
        super().__init__("meta", granule=CARD_GRANULE, hidden=partial(hidden_bytes, split=split))
        self.requests: list[tuple[int, int]] = []
        self._kept: list[Any] = []  # so that no two records have one id

    def hold(self, size: int) -> None:
        """Memory that is taken for good."""
        self._kept.append(object())
        self.requests.append((id(self._kept[-1]), size))

    def _add(self, record: Any) -> None:
        super()._add(record)
        self.requests.append((id(record), record.size))
        self._kept.append(record)

    def _freed(self, key: int) -> None:
        known = self._known.get(key)
        super()._freed(key)
        if known is not None:
            self.requests.append((id(known[1]), -1))

    def pass_through(self, size: int, name: str) -> None:
        """Memory that a kernel takes and gives back."""
        super().pass_through(size, name)
        self.requests.append((self.requests[-1][0], -1))

    def forget(self, tensor: torch.Tensor) -> None:
        """Take a tensor out of the count, and out of the allocator."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        super().forget(tensor)
        if known is not None:
            self.requests.append((id(known[1]), -1))


def chat_lengths(longest: int, seed: int) -> list[int]:
    """Row lengths as chats have them: log-normal around 500 tokens; one as long as the longest."""
    draw = random.Random(seed)
    return [longest] + [min(longest, max(32, int(draw.lognormvariate(6.2, 0.8)))) for _ in range(BATCH - 1)]


def requests(plan: Plan, config: Any) -> list[list[tuple[int, int]]]:
    """The requests of a run, cut where the cache is emptied: between loading, warm-up, selection and the rest.

    Args:
        plan: Its settings.
        config: The model's.
    """
    work, recorder = plan.work, Recorder(plan.work.deterministic)
    trace = Trace.without_data(config, work)
    trace.tracker = recorder
    cuts = [0]
    with fused_kernels(on_cpu=False):
        set_attention(trace.model, work.attention)
        set_checkpointing(trace.model, work.checkpointing)
        with recorder, recorder.watching(trace.model):
            for phase in _phases(trace):
                cuts.append(len(recorder.requests))
                assert phase
    return [recorder.requests[start:end] for start, end in itertools.pairwise(cuts)]


def _phases(trace: Trace) -> Iterator[str]:
    work = trace.work
    trace._count_model()
    inject_low_rank(trace.model, work.allocation.ranks, dropout=work.dropout)
    low_rank = [p for layer in trace.layers.values() for p in layer.adapter_parameters().values()]
    optimizer = AdapterOptimizer(low_rank, kind=work.optimizer)
    trace._settle(optimizer)
    trace.model.train()
    yield "load"
    trace.tracker.hold(work.overhead.workspace)  # cuBLAS's, through the same allocator
    runner = StepRunner(
        trace.model,
        optimizer,
        limits=Limits(work.rows, work.tokens),
        pad_id=0,
        seed=0,
        device=trace.device,
        chunk_tokens=work.loss_chunk_tokens,
    )
    _steps(trace, runner, optimizer, (1, 2))
    yield "warm-up"
    trace.tracker.padded = False
    if work.allocation.nnz_total and work.score.reads_gradients:
        trace._select([1] * work.length)
    yield "select"
    trace._add_sparse(optimizer)
    trace._settle(optimizer)
    trace.model.train()
    _steps(trace, runner, optimizer, (3, 4))
    yield "train"


def _steps(trace: Trace, runner: StepRunner, optimizer: AdapterOptimizer, seeds: Sequence[int]) -> None:
    for seed in seeds:
        rows = [EncodedRow([1] * n, [1] * n) for n in chat_lengths(trace.work.length, seed)]
        trace.tracker.padded = True
        runner.gradients(rows, seed, sum(map(supervised_tokens, rows)))
        trace.tracker.stage = UPDATE
        optimizer.clip(1.0)
        optimizer.step(lr=0.0, sparse_lr=0.0)
        trace.tracker.stage = FORWARD


def reserved(phases: list[list[tuple[int, int]]], allocator: Segments) -> list[int]:
    """Bytes that an allocator reserves at most in each phase of a run whose cache is emptied between phases."""
    live: dict[int, Block] = {}
    found = []
    for phase in phases:
        allocator.empty_cache()
        allocator.peak = allocator.reserved
        for key, size in phase:
            if size >= 0:
                live[key] = allocator.take(size)
            elif key in live:
                allocator.give(live.pop(key))
        found.append(allocator.peak)
    return found


def room(plan: Plan) -> list[int]:
    """Bytes that the plan gives torch's allocator in the phases of ``requests``: all but what the driver takes."""
    beside = ("cuda_context", "nccl")
    given = {
        name: memory.device_total - sum(memory.device.get(part, 0) for part in beside)
        for name, memory in plan.phases.items()
    }
    # The first part ends with adapter and optimizer made, which are training's.
    return [given["train"], given["train"], given["select"], given["train"]]


def planned(vram: int, length: int, **asked: Any) -> Plan:
    """The plan of an 8B model with rows of ``length`` tokens under a cap."""
    groups = make_groups({"budget": "0.3%", "offload": "none", "batch_size": BATCH, "seq_len": length} | asked)
    shape = from_config(MODEL, SHAPES[MODEL])
    return solve(make_request(shape, groups, Here(card=None, host=0), vram=vram, device="cuda"))


def config() -> Any:
    """The model's transformers config."""
    from transformers import AutoConfig

    settings = dict(SHAPES[MODEL])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def main() -> None:
    """An 8B model at 8 and 24 GB."""
    for vram, length, checkpointing in CASES:
        plan = planned(vram * GB, length, checkpointing=checkpointing)
        phases = requests(plan, config())
        for kind in (Segments, Expandable):
            for name, size, most in zip(PHASES, reserved(phases, kind()), room(plan), strict=True):
                words = f"{vram} GB, {length} tokens, recomputing {checkpointing}, {kind.__name__.lower()}, {name}"
                print(f"{words}: {size / GB:.2f} of {most / GB:.2f} GiB ({100 * (size / most - 1):+.1f}%)", flush=True)


if __name__ == "__main__":
    main()
