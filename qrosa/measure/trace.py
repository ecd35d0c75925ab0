"""One model going through the phases of a run under a tracker: on ``meta`` for ``simulate``, for real for ``measure``.

Adapter, optimizer, selection, step and evaluation are the run's own functions; here is only the order of them, and what
each lasting tensor is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.forms import form_named
from qrosa.adapters.inject import adapter_parameters, inject_low_rank, quantized_linears
from qrosa.base.build import empty_model
from qrosa.config import TrainConfig
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.encode import EncodedRow
from qrosa.eval.perplexity import evaluate_loss
from qrosa.eval.preferences import sum_preferences
from qrosa.masks.exact import accumulate
from qrosa.masks.observe import observe, run_backward
from qrosa.masks.selection_rows import Sample
from qrosa.measure.card import CARD_GRANULE, hidden_bytes
from qrosa.measure.tracker import EVALUATION, FORWARD, UPDATE, Peak, StorageTracker
from qrosa.model.modes import offload_activations, set_attention, set_checkpointing
from qrosa.offload.packing import FlatWeight, flat_layout
from qrosa.offload.streaming import BaseStream
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.kinds import OPTIMIZERS
from qrosa.optim.parts import SPARSE
from qrosa.planner.bytes import components as parts
from qrosa.planner.workload import Workload
from qrosa.quant.nf4 import NF4Weight
from qrosa.sparse.csr import CsrDelta, column_dtype
from qrosa.train.preferences import make_runner
from qrosa.train.selection import sample_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MicroBatchRows = list[list[int]]


def worst_micro_batches(work: Workload) -> list[MicroBatchRows]:
    """Micro-batches that may be the largest, as rows of tokens.

    Rows that fill the longest length, the last one a token short, so that a mask is needed; where only one such row
    fits, also two of half its length. Packed, as many tokens as fit, the last row as long as is left.
    """
    if work.packed:
        return packed_micro_batches(work)
    count = min(work.rows, max(1, work.tokens // work.length))
    full = [[1] * work.length for _ in range(count)]
    if count > 1:
        full[-1] = full[-1][:-1]
        return [full]
    half = work.tokens // 2
    if work.rows == 1 or half < 3 or work.attention == "eager":  # half as long rows have half the scores
        return [full]
    return [full, [[1] * half, [1] * (half - 1)]]


def packed_micro_batches(work: Workload) -> list[MicroBatchRows]:
    """The same of packed rows; where one fills a micro-batch, attention takes it without joining rows."""
    lengths = work.packed_lengths
    found = [[[1] * length for length in lengths]]
    if len(lengths) == 1 and work.rows > 1 and work.tokens > 3:
        found.append([[1] * (work.tokens - work.tokens // 2), [1] * (work.tokens // 2)])
    return found


class Trace:
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
    def without_data(cls, config: PretrainedConfig, work: Workload) -> Trace:
        """A trace of a model on ``meta``."""
        model = empty_model(config)
        table: Tensor | None = None
        for layer in quantized_linears(model).values():  # one table for all, as loading leaves it
            table = table if table is not None else layer.weight.absmax_code
            layer.weight.absmax_code = table
        cast(nn.Module, model).to("meta")
        granule = 1 if work.on_cpu else CARD_GRANULE
        hidden = partial(hidden_bytes, split=work.deterministic)
        return cls(model, work, StorageTracker("meta", granule=granule, hidden=hidden))

    def run(self, rows: list[list[int]], *, select: bool) -> dict[str, Peak]:
        """All phases in a run's order: adapter, selection, sparse part, a training step, evaluation."""
        work, found = self.work, {}
        set_attention(self.model, work.attention, by_row=work.packed)
        set_checkpointing(self.model, work.checkpointing)
        if work.offload_activations:
            offload_activations(self.model, self.device)
        with self.tracker, self.tracker.watching(self.model):
            if work.resident_blocks is not None:
                self._stream_base(work.resident_blocks)
            self._count_model()
            form = form_named(work.allocation.form)
            inject_low_rank(self.model, work.allocation.ranks, dropout=work.dropout, form=form)
            kind = OPTIMIZERS[work.optimizer]
            optimizer = AdapterOptimizer(adapter_parameters(self.model).low_rank, kind=kind.stand_in or kind.name)
            self._settle(optimizer)
            self.model.train()
            if select and work.selects_by_gradients:
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

    def _stream_base(self, resident: int) -> None:
        """Keep the base on the host but for the blocks that stay and the slots that the others visit."""
        flats = {path: _on_host(layer.weight) for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.weight = flats[path].weight()
        stream = BaseStream(self.model, flats, self.device, resident)
        for slot in stream.slots:
            self.tracker.count(slot.buffer, "base", "the slots of streamed blocks")

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
            paged = OPTIMIZERS[self.work.optimizer].paged and not self.work.on_cpu
            for key, state in group.optimizer.state[group.master].items():
                if isinstance(state, Tensor) and paged and state.dtype == torch.uint8:
                    self.tracker.forget(state)  # unified memory: it lies on the host
                elif isinstance(state, Tensor):
                    self.tracker.count(state, "optimizer", f"{name}.{key}")
        for path, layer in self.layers.items():
            for name, tensor in layer.adapter_tensors().items():
                if name != "sparse_values":  # the optimizer's master, counted above
                    self.tracker.count(tensor, "adapter", path)

    def _select(self, tokens: list[int]) -> Peak:
        """One sample through each group of matrices that may be the largest to collect statistics for together."""
        work = self.work
        if work.mask_candidates:
            return self._stream(Sample(tokens, tokens))
        groups = parts.statistic_groups(work.allocation, work.mask_scope, work.mask_group_bytes)
        return max((self._collect(group, Sample(tokens, tokens)) for group in groups), key=lambda peak: peak.total)

    def _collect(self, group: list[str], sample: Sample) -> Peak:
        observed = {path: self.layers[path] for path in group}
        with self.tracker.phase() as found:
            statistics = {path: torch.zeros(x.weight.shape, device=self.device) for path, x in observed.items()}
            for path, statistic in statistics.items():
                self.tracker.count(statistic, "mask_statistics", path)
            loss = sample_loss(self.work.loss_chunk_tokens)
            accumulate(self.model, observed, statistics, [sample], self.work.score.squares, loss)
        return found[0]

    def _stream(self, sample: Sample) -> Peak:
        """One sample whose gradients are looked at while candidates are there.

        What a look does depends on data, so the plan's own figure stands for it; a test holds that against real ones.
        """
        work, size = self.work, parts.looking_bytes(self.work)
        observed = {path: self.layers[path] for path in parts.observed(work.allocation, work.mask_scope)}

        def look(dy: Tensor, x: Tensor) -> None:
            self.tracker.pass_through(size, "looking at a gradient")

        with self.tracker.phase() as found:
            kept = torch.empty(parts.candidate_bytes(work), dtype=torch.uint8, device=self.device)
            self.tracker.count(kept, "mask_statistics", "candidates")
            with observe(observed, dict.fromkeys(observed, look)) as anchor:
                run_backward(self.model, [sample], anchor, sample_loss(work.loss_chunk_tokens))
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
        if work.goal.compares:
            encoded = [*encoded, *encoded]  # in micro-batches of the same size
        runner = make_runner(
            TrainConfig(objective=work.objective),
            self.model,
            optimizer,
            limits=limits,
            pad_id=0,
            seed=0,
            device=self.device,
            chunk_tokens=work.loss_chunk_tokens,
            packed=work.packed,
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
        rows = worst_micro_batches(replace(work, rows=tokens, tokens=tokens, packed=False))[-1]
        self.tracker.padded = len({len(row) for row in rows}) > 1
        self.tracker.stage = EVALUATION
        with self.tracker.phase() as found:
            if work.goal.compares:
                encoded = _encoded([*rows, *rows])
                sum_preferences(self.model, encoded, work.goal, TrainConfig(), max_tokens=tokens)
            else:
                evaluate_loss(self.model, _encoded(rows), max_tokens=tokens)
        return found[0]


def _on_host(weight: NF4Weight) -> FlatWeight:
    """A layer's place in host memory: never written, so that it takes addresses only."""
    offsets, nbytes = flat_layout(weight)
    template = replace(weight, absmax_code=torch.empty(256))
    return FlatWeight(torch.empty(nbytes, dtype=torch.uint8), template, offsets)


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
