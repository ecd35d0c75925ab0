"""The real training step on tensors without data: what each phase takes, tensor by tensor, on a machine without a card.

The model is transformers' own class, adapters go in by the real budget, and mask selection, gradients, optimizer step and
evaluation are the functions that a run calls, on the ``meta`` device, where an operator computes sizes and nothing
else. Every tensor is counted as it comes and goes (``simulate_tracker``), so the peak is found where it is and not where a
formula expects it, and it has names. Only config.json is read. An 8B model takes some ten seconds.

The same trace runs on a real model, where it counts real storages: a test holds the two against each other.

What is not a tensor is not here: the CUDA context, cuBLAS's workspace, blocks that the allocator caches or splits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.load import empty_model
from qrosa.data.template import EncodedRow
from qrosa.errors import InputError
from qrosa.eval.perplexity import evaluate_loss
from qrosa.masks.groups import group_matrices
from qrosa.masks.samples import Sample
from qrosa.masks.select import accumulate
from qrosa.memory.model import GRADIENT_SCORES, Workload
from qrosa.memory.parts import observed
from qrosa.ops.linear import meta_like_cpu
from qrosa.sparse.csr import CsrDelta, column_dtype
from qrosa.train.modes import set_attention, set_checkpointing
from qrosa.train.optim import SPARSE, AdapterOptimizer
from qrosa.train.selection import sample_loss
from qrosa.train.simulate_card import CARD_GRANULE, card_kernels, hidden_bytes
from qrosa.train.simulate_tracker import EVALUATION, FORWARD, UPDATE, Allocation, Peak, StorageTracker
from qrosa.train.step import Limits, StepRunner, supervised_tokens

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
        InputError: The model cannot be built.
    """
    return simulate_model(read_config(source), work)


def simulate_model(config: PretrainedConfig, work: Workload) -> Simulation:
    """The same for a transformers config."""
    phases: dict[str, Peak] = {}
    for number, rows in enumerate(_worst_micro_batches(work)):
        with _devices(work), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _Trace.without_data(config, work).run(rows, select=number == 0)
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
    return Simulation(_Trace(model, work, StorageTracker("cpu", hidden=hidden_bytes)).run([list(row) for row in rows], select=True))


def read_config(source: str) -> PretrainedConfig:
    """A base's transformers config, of the text model alone.

    Raises:
        InputError: There is none, or it is not understood.
    """
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        from qrosa.base.checkpoint import open_checkpoint

        return open_checkpoint(source).config
    try:
        config = AutoConfig.from_pretrained(path if path.is_dir() else source)
    except Exception as error:  # transformers raises whatever its parser met
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"the config.json of {source} is not understood: {first}", "use a model that this transformers knows"
        ) from None
    text = getattr(config, "text_config", None) or config
    if getattr(text, "quantization_config", None) is not None:
        del text.quantization_config
    return text  # type: ignore[no-any-return]


def largest_tensors(allocations: Sequence[Allocation], count: int) -> list[LiveTensors]:
    """Group allocations that differ in the decoder layer only, and take the largest groups."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for one in allocations:
        module = ".".join("*" if piece.isdigit() else piece for piece in one.module.split("."))
        key = (one.component, module, one.shape, str(one.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(one.size)
    made = [LiveTensors(*key, count=len(sizes), size=sum(sizes)) for key, sizes in groups.items()]
    return sorted(made, key=lambda tensors: -tensors.size)[:count]


def _worst_micro_batches(work: Workload) -> list[list[list[int]]]:
    """Micro-batches that may be the largest, as rows of tokens.

    Rows that fill the longest length, the last one a token short, so that a mask is needed; where only one such row
    fits, also two of half its length.
    """
    count = min(work.rows, max(1, work.tokens // work.length))
    full = [[1] * work.length for _ in range(count)]
    if count > 1:
        full[-1] = full[-1][:-1]
        return [full]
    half = work.tokens // 2
    if work.rows == 1 or half < 3 or work.attention == "eager":  # half as long rows have half the scores
        return [full]
    return [full, [[1] * half, [1] * (half - 1)]]


@contextmanager
def _devices(work: Workload) -> Iterator[None]:
    """``meta`` tensors behave as the planned device's."""
    with meta_like_cpu() if work.on_cpu else card_kernels():
        yield


class _Trace:
    """One model going through the phases of a run under a tracker.

    Args:
        model: A base without adapters, on ``meta`` or on the CPU.
        work: The settings.
        tracker: Counts storages of the model's device.
    """

    def __init__(self, model: nn.Module, work: Workload, tracker: StorageTracker) -> None:
        self.model, self.work, self.tracker = model, work, tracker
        self.device = torch.device(tracker.device)
        self.layers = quantized_linears(model)

    @classmethod
    def without_data(cls, config: PretrainedConfig, work: Workload) -> _Trace:
        """A trace of a model on ``meta``."""
        model = empty_model(config)
        table: Tensor | None = None
        for layer in quantized_linears(model).values():  # one table for all, as loading leaves it
            table = table if table is not None else layer.weight.absmax_code
            layer.weight.absmax_code = table
        model.to("meta")
        granule = 1 if work.on_cpu else CARD_GRANULE
        return cls(model, work, StorageTracker("meta", granule=granule, hidden=hidden_bytes))

    def run(self, rows: list[list[int]], *, select: bool) -> dict[str, Peak]:
        """All phases in a run's order: adapter, selection, sparse part, a training step, evaluation."""
        work, found = self.work, {}
        set_attention(self.model, work.attention)
        set_checkpointing(self.model, work.checkpointing)
        self._count_model()
        with self.tracker, self.tracker.watching(self.model):
            inject_low_rank(self.model, work.allocation.ranks, dropout=work.dropout)
            low_rank = [p for layer in self.layers.values() for p in layer.adapter_parameters().values()]
            paged = work.optimizer.startswith("paged")
            optimizer = AdapterOptimizer(low_rank, kind="adamw8bit" if paged else work.optimizer)
            self._settle(optimizer)
            self.model.train()
            if select and work.allocation.nnz_total and work.mask_score in GRADIENT_SCORES:
                found["select"] = self._select([1] * work.length if self.device.type == "meta" else max(rows, key=len))
            self._add_sparse(optimizer)
            self._settle(optimizer)
            found["train"] = self._train(optimizer, rows)
            found["eval"] = self._evaluate()
        return found

    def _count_model(self) -> None:
        for path, layer in self.layers.items():
            for tensor in layer.weight.tensors().values():
                self.tracker.count(tensor, "base", path)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            self.tracker.count(tensor, "unquantised", name.rpartition(".")[0])

    def _settle(self, optimizer: AdapterOptimizer) -> None:
        """Make the optimizer's states, as a run's first step does, and say what each of its tensors is."""
        for name, group in optimizer.groups.items():
            if name == SPARSE and not self.work.allocation.nnz_total:
                continue
            if not group.optimizer.state:
                group.step(0.0)
            if self.device.type == "meta" and "fused" in group.optimizer.param_groups[0]:
                # torch makes no fused optimizer for meta tensors, but runs one: on a card and on the CPU it is fused.
                group.optimizer.param_groups[0]["fused"] = True
            self.tracker.count(group.master, "adapter" if name == SPARSE else "optimizer", name)
            self.tracker.count(group.gradient, "gradients", name)
            for key, state in group.optimizer.state[group.master].items():
                if isinstance(state, Tensor):
                    self.tracker.count(state, "optimizer", f"{name}.{key}")
                    if self.work.optimizer.startswith("paged") and not self.work.on_cpu and state.dtype == torch.uint8:
                        self.tracker.forget(state)
        for path, layer in self.layers.items():
            for tensor in (layer.low_rank_A, layer.low_rank_B, layer.sparse_row_ptr, layer.sparse_col):
                if tensor is not None:
                    self.tracker.count(tensor, "adapter", path)

    def _select(self, tokens: list[int]) -> Peak:
        """One sample through the largest group of matrices whose statistics are collected together."""
        work, sizes = self.work, observed(self.work.allocation, self.work.mask_scope)
        groups = group_matrices(sizes, max(work.mask_group_bytes, 4 * max(sizes.values())))
        group = max(groups, key=lambda paths: sum(sizes[path] for path in paths))
        with self.tracker.phase() as found:
            statistics = {}
            for path in group:
                statistics[path] = torch.zeros(self.layers[path].weight.shape, device=self.device)
                self.tracker.count(statistics[path], "mask_statistics", path)
            square = work.mask_score == "squared"
            observed_layers = {path: self.layers[path] for path in group}
            loss = sample_loss(work.loss_chunk_tokens)
            accumulate(self.model, observed_layers, statistics, [Sample(tokens, tokens)], square, loss)
            statistics.clear()
        return found[0]

    def _add_sparse(self, optimizer: AdapterOptimizer) -> None:
        """Sparse parts of the planned sizes; where their positions are changes no size."""
        values = []
        for path, layer in self.layers.items():
            nnz, (rows, columns) = self.work.allocation.nnz[path], layer.weight.shape
            if nnz:
                layer.set_sparse(_spread_delta(nnz, rows, columns, self.device))
                assert layer.sparse_values is not None
                values.append(layer.sparse_values)
        if values:
            optimizer.add_sparse(values)

    def _train(self, optimizer: AdapterOptimizer, rows: list[list[int]]) -> Peak:
        """One optimizer step: gradients of a micro-batch, clipping, update."""
        work = self.work
        encoded = _encoded(rows)
        limits = Limits(len(rows), max(work.tokens, max(len(row) for row in rows)))
        runner = StepRunner(
            self.model,
            optimizer,
            limits=limits,
            pad_id=0,
            seed=0,
            device=self.device,
            chunk_tokens=work.loss_chunk_tokens,
        )
        self.model.train()
        self.tracker.padded = len({len(row) for row in rows}) > 1
        with self.tracker.phase() as found:
            runner.gradients(encoded, 0, sum(supervised_tokens(row) for row in encoded))
            self.tracker.stage = UPDATE
            optimizer.clip(1.0)
            optimizer.step(lr=0.0, sparse_lr=0.0)
            self.tracker.stage = FORWARD
        return found[0]

    def _evaluate(self) -> Peak:
        """A micro-batch of the evaluation's size, training's state in place."""
        work = self.work
        tokens = max(work.eval_tokens, work.length)
        rows = _worst_micro_batches(replace(work, rows=tokens, tokens=tokens))[-1]
        self.tracker.padded = len({len(row) for row in rows}) > 1
        self.tracker.stage = EVALUATION
        with self.tracker.phase() as found:
            evaluate_loss(self.model, _encoded(rows), max_tokens=tokens)
        return found[0]


def _encoded(rows: Sequence[list[int]]) -> list[EncodedRow]:
    """Rows that carry loss on every token."""
    return [EncodedRow(row, list(row)) for row in rows]


def _spread_delta(nnz: int, rows: int, columns: int, device: torch.device) -> CsrDelta:
    """A sparse part with ``nnz`` positions at even distances."""
    if device.type != "meta":
        positions = torch.arange(nnz, device=device) * (rows * columns // nnz)
        return CsrDelta.from_positions(positions, (rows, columns))
    return CsrDelta(
        torch.empty(rows + 1, dtype=torch.int32, device=device),
        torch.empty(nnz, dtype=column_dtype(columns), device=device),
        torch.empty(nnz, dtype=torch.float32, device=device),
        (rows, columns),
    )
