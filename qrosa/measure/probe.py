"""Real steps of the real model on the device that is here: what each phase takes, beside what was planned.

The closed form and the simulation count tensors; a probe sees what they cannot: the driver, what the allocator keeps,
kernels that are chosen by device, and the time of a step. It loads the base, puts the adapter on and calls the
functions of a run in a run's order, at the largest micro-batch of the longest rows, every token supervised. Positions
of the sparse part are random and rows are made up, since neither changes a size; learning rates are zero. Nothing is
written.

The trade-off against a short run of ``finetune``: no row files, no output folder, and the worst micro-batch first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrosa.adapters.inject import adapter_parameters, quantized_linears
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.base_files import BaseFiles
from qrosa.base.open import open_base
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.encode import EncodedRow
from qrosa.errors import DoesNotFitError, InputError
from qrosa.eval.perplexity import evaluate_loss
from qrosa.eval.preferences import sum_preferences
from qrosa.heap import look_at_each
from qrosa.masks.random_masks import random_positions
from qrosa.masks.repair import set_masks
from qrosa.masks.select import choose_positions
from qrosa.model.card import held_to, measure_overhead, with_index
from qrosa.model.heap import look_at_layers
from qrosa.model.place import load_planned
from qrosa.ops.determinism import deterministic, fix_workspace
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.parts import Optimizer
from qrosa.optim.zero.optimizer import ZeroOptimizer
from qrosa.planner.bytes.components import statistic_groups
from qrosa.planner.hardware import Overhead, read_here
from qrosa.planner.plan import Plan
from qrosa.planner.workload import Workload
from qrosa.quantities import parse_offload
from qrosa.record.meter import MemoryMeter
from qrosa.train.preferences import make_runner
from qrosa.train.selection import sample_loss
from qrosa.train.step import free_memory, is_out_of_memory

WARM_UP, MEASURED = 2, 3  # steps: until allocator and caches have settled, and those whose median counts
PHASES = ("load", "select", "train", "eval")


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        planned: Phase -> bytes as planned, for the phases that ran.
        measured: Phase -> highest bytes: allocated by torch on a card, resident in the process on the CPU.
        reserved: Phase -> highest bytes that torch's allocator took from the card; empty on the CPU.
        failed: The phase that ran out of memory, if one did.
        cap: Bytes that may be used.
        overhead: What the process takes of a card beside tensors; None on the CPU.
        micro_batch_seconds: Median seconds of a micro-batch, forward and backward; None where training did not run.
        optimizer_seconds: The same of clipping and the update.
        step_seconds: Seconds of a step of the effective batch, all its rows as long as the longest: the two above, as
            often as the plan needs them.
        tokens_per_s: Tokens a second in the measured micro-batches and updates.
    """

    planned: dict[str, int]
    measured: dict[str, int]
    reserved: dict[str, int]
    failed: str | None
    cap: int
    overhead: Overhead | None = None
    micro_batch_seconds: float | None = None
    optimizer_seconds: float | None = None
    step_seconds: float | None = None
    tokens_per_s: float | None = None

    @property
    def peak(self) -> int:
        """Most bytes of any phase, with what the allocator reserved and the card's context."""
        beside = self.overhead.context if self.overhead is not None else 0
        return beside + max([*self.measured.values(), *self.reserved.values()], default=0)

    @property
    def fits(self) -> bool:
        """No phase ran out of memory, and none took more than the cap."""
        return self.failed is None and self.peak <= self.cap

    def to_json(self) -> dict[str, Any]:
        """What ``--probe`` adds to the plan's document, under ``probe``."""
        made: dict[str, Any] = {}
        for name, measured in self.measured.items():
            made[name] = {
                "planned": self.planned[name],
                "measured": measured,
                "ratio": self.planned[name] / measured,
                "reserved": self.reserved.get(name),
            }
        made["overhead"] = dataclasses.asdict(self.overhead) if self.overhead is not None else None
        times = ("micro_batch_seconds", "optimizer_seconds", "step_seconds", "tokens_per_s")
        return made | {name: getattr(self, name) for name in times} | {"failed": self.failed, "fits": self.fits}

    def require_fit(self) -> None:
        """Refuse settings that the probe found too large.

        Raises:
            DoesNotFitError: They are.
        """
        if self.fits:
            return
        highest = max(self.measured, key=lambda name: self.measured[name])
        what = f"{self.failed} ran out of memory" if self.failed else f"{highest} took more than the memory asked for"
        raise DoesNotFitError(
            f"the probe does not fit: {what}",
            "plan with a smaller --vram, a smaller --micro-batch or shorter rows (--seq-len), and probe again",
        )


def probe(source: str, made: Plan, seed: int = 42, stage: Callable[[str, int, int], None] | None = None) -> Probe:
    """Run the planned settings for a few steps.

    Args:
        source: The base, as the user named it.
        made: A plan for the device that is here.
        seed: Of made-up rows and random positions.
        stage: Told what is being done, how much of it, and of how much.

    Returns:
        Peaks by phase and the time of a step. A phase that runs out of memory ends the probe and is named.

    Raises:
        InputError: No such base; a base or an optimizer that the plan keeps in files, which would have to be written;
            DeepSpeed is asked for and not there; several processes.
        StorageError: Damaged files.
    """
    _check(made)
    running = _Probing(open_base(source), made, seed, stage or (lambda name, done, of: None))
    return running.go()


def _check(made: Plan) -> None:
    """Refuse what cannot be probed, before anything is loaded."""
    zero = made.work.zero
    if made.work.base_on_disk:
        raise InputError("--probe writes nothing, and base=disk maps the base from files", "probe with --offload base")
    if zero is not None and zero.offload == "nvme":
        raise InputError(
            "--probe writes nothing, and optimizer=nvme keeps the optimizer on a drive",
            "probe with --offload auto,optimizer",
        )
    if made.work.processes > 1:
        raise InputError("--probe runs in one process, and several were started", "start it without a launcher")
    if zero is not None:
        from qrosa.optim.zero.engine import check_available

        check_available(zero, made.work.device)


class _Failed(Exception):
    """A phase ran out of memory."""


class _Probing:
    def __init__(self, base_files: BaseFiles, made: Plan, seed: int, stage: Callable[[str, int, int], None]) -> None:
        self.base_files, self.made, self.work, self.seed, self.stage = base_files, made, made.work, seed, stage
        self.device = with_index(made.work.device)
        self.meter = MemoryMeter(self.device, plan=made)
        self.failed: str | None = None
        self.rows = worst_rows(made.work, self.vocabulary, seed)
        self.times: dict[str, float] = {}

    def go(self) -> Probe:
        cap, strict = self.made.request.cap, self.made.request.train.deterministic == "on"
        overhead = None
        if self.device.type == "cuda":
            fix_workspace()
            overhead = measure_overhead(self.device, read_here().card_free, strict=strict)
        beside = overhead.context if overhead is not None else 0
        with deterministic(strict), held_to(self.device, cap, beside), contextlib.suppress(_Failed):
            self._phases()
        if self.failed is not None:
            free_memory()
        planned = {name: self.made.planned[name] for name in self.meter.peaks}
        return Probe(planned, self.meter.peaks, self.meter.reserved, self.failed, cap, overhead, **self.times)

    def _phases(self) -> None:
        model, optimizer = self._load()
        try:
            self._select(model, optimizer)
            self._train(model, optimizer)
            self._evaluate(model)
        finally:
            optimizer.close()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.stage(name, 0, 1)
        try:
            with self.meter.phase(name):
                yield
        except Exception as error:
            if not (is_out_of_memory(error) or isinstance(error, DoesNotFitError)):
                raise
            self.failed = name
        if self.failed is not None:  # outside the handler, whose traceback would keep the tensors alive
            raise _Failed

    def _load(self) -> tuple[nn.Module, Optimizer]:
        request = self.made.request
        disk = parse_offload(request.train.offload).disk
        with self._phase("load"):
            progress = look_at_each(lambda n, of: self.stage("load", n, of))
            model = load_planned(self.base_files, self.work, self.device, disk, progress)
            if self.device.type == "cpu":
                look_at_layers(model)
            attach_adapter(model, request.adapter, self.seed, self.work.allocation)
        low_rank = adapter_parameters(model).low_rank
        if self.work.zero is None:
            return model, AdapterOptimizer(low_rank, kind=request.train.optimizer)
        return model, ZeroOptimizer(low_rank, settings=self.work.zero, max_norm=request.train.max_grad_norm)

    def _select(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Each pass that may be the largest, on one longest row; then positions at random, with the run's values."""
        work, request = self.work, self.made.request
        if not work.allocation.nnz_total:
            return
        original = None if self.base_files.kind == "nf4" else self.base_files
        nnz = work.allocation.nnz
        with self._phase("select"):
            for group in self._groups():
                choose_positions(
                    model,
                    self.rows[:1],
                    config=dataclasses.replace(request.masks, mask_selection=self.made.mask_selection),
                    nnz={path: nnz[path] for path in group},
                    seed=self.seed,
                    group_bytes=work.mask_group_bytes or None,
                    candidate_factor=work.mask_candidates or None,
                    loss=sample_loss(work.loss_chunk_tokens),
                    base_files=original,
                )
            layers = quantized_linears(model)
            sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
            positions = random_positions(sizes, nnz, "matrix", self.seed)
            init = request.adapter.sparse_init
            set_masks(model, positions, init=init, base_files=original if init == "residual" else None)
        optimizer.add_sparse(adapter_parameters(model).sparse)

    def _groups(self) -> list[list[str]]:
        """Matrices of the passes to run; all at once where statistics are streamed, or none are collected."""
        work = self.work
        if work.mask_candidates or not work.score.reads_gradients:
            return [list(work.allocation.nnz)]
        return statistic_groups(work.allocation, work.mask_scope, work.mask_group_bytes)

    def _train(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Steps of one micro-batch each."""
        work = self.work
        rows = self.rows * 2 if work.goal.compares else self.rows  # in micro-batches of the same size
        runner = make_runner(
            self.made.request.train,
            model,
            optimizer,
            limits=Limits(work.rows, max(work.tokens, work.length)),
            pad_id=0,
            seed=self.seed,
            device=self.device,
            chunk_tokens=work.loss_chunk_tokens,
            packed=work.packed,
            on_shrink=_refuse,
        )
        model.train()
        backward, update = [], []
        for step in range(WARM_UP + MEASURED):
            self.stage("train", step, WARM_UP + MEASURED)
            with self._phase("train"):
                begun = self._now()
                runner.gradients(rows, step, sum(map(supervised_tokens, rows)))
                between = self._now()
                optimizer.update(lr=0.0, sparse_lr=0.0, max_norm=self.made.request.train.max_grad_norm)
                done = self._now()
            backward.append((between - begun) * len(self.rows) / len(rows))
            update.append(done - between)
        self._note_times(statistics.median(backward[WARM_UP:]), statistics.median(update[WARM_UP:]))

    def _note_times(self, backward: float, update: float) -> None:
        """Times of a micro-batch and an update, and of the whole step that they are parts of."""
        batch, work = self.made.request.train.step_rows, self.work
        # A micro-batch, in longest rows.
        held = sum(work.packed_lengths) / work.length if work.packed else len(self.rows)
        seconds = batch / held * backward + update
        self.times = {
            "micro_batch_seconds": backward,
            "optimizer_seconds": update,
            "step_seconds": seconds,
            "tokens_per_s": batch * work.length / seconds,
        }

    def _evaluate(self, model: nn.Module) -> None:
        tokens = max(self.work.eval_tokens, self.work.length)
        padded = dataclasses.replace(self.work, rows=tokens, tokens=tokens, packed=False)
        rows = worst_rows(padded, self.vocabulary, self.seed)
        with self._phase("eval"):
            if self.work.goal.compares:
                sum_preferences(model, rows * 2, self.work.goal, self.made.request.train, max_tokens=tokens)
            else:
                evaluate_loss(model, rows, max_tokens=tokens)

    @property
    def vocabulary(self) -> int:
        """Tokens that rows may hold."""
        return int(self.base_files.config.vocab_size)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def worst_rows(work: Workload, vocabulary: int, seed: int) -> list[EncodedRow]:
    """Rows that fill the largest micro-batch, all supervised; padded, the last one is a token short, to need a mask."""
    count = min(work.rows, max(1, work.tokens // work.length))
    draw = random.Random(seed)
    padded = [work.length] * (count - 1) + [work.length - (count > 1 and work.length > 2)]
    lengths = work.packed_lengths if work.packed else padded
    rows = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
    return [EncodedRow(row, list(row)) for row in rows]


def _refuse(step: int, before: Limits, after: Limits) -> None:
    raise DoesNotFitError(f"a micro-batch of {before.rows} rows does not fit", f"use --micro-batch {after.rows}")
