"""A fine-tuning run from its settings to its report.

prepare (refuses what cannot work) -> load the base -> measure ranks, if asked -> put the adapter on -> steps
-> adapter, report, card
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import attach_adapter, load_adapter, save_adapter, set_speech
from qrosa.config import RunConfig, to_flat
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.errors import InputError
from qrosa.files import write_json, write_text
from qrosa.heap import look_at_each
from qrosa.masks.repair import init_low_rank, set_masks
from qrosa.masks.select import choose_positions
from qrosa.model.card import held_to, with_index
from qrosa.model.heap import look_at_layers
from qrosa.model.place import load_planned
from qrosa.ops.determinism import deterministic, fix_workspace
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.kinds import OPTIMIZERS
from qrosa.optim.local_steps import LocalStepsOptimizer
from qrosa.optim.machines import Machines
from qrosa.optim.parts import Optimizer, adapter_parts
from qrosa.optim.zero.optimizer import ZeroOptimizer
from qrosa.planner.hardware import ask_for_expandable_segments, processes_on_this_host
from qrosa.planner.show import document
from qrosa.quantities import parse_offload
from qrosa.record.checkpoint import Checkpoint, check_same_run, latest, recover, step_folder
from qrosa.record.folder import ADAPTER_FOLDER, CONFIG_FILE, PLAN_FILE, check_output, machine_folder, open_folder
from qrosa.record.lock import RunLock
from qrosa.record.logs import restore
from qrosa.record.machine import describe_machine
from qrosa.record.meter import MemoryMeter
from qrosa.record.state import RunState
from qrosa.report.facts import Facts, ModuleShare
from qrosa.report.report import write_report
from qrosa.train.agree import agree
from qrosa.train.base import feedback_base, name_home, take_home
from qrosa.train.best import check_best, kept_step, take_values
from qrosa.train.callbacks import Advance, Callback, Callbacks
from qrosa.train.loop import LoopParts, TrainingLoop
from qrosa.train.prepare import Prepared, prepare, with_absolute_places
from qrosa.train.ranks import measure_ranks, stored_ranks, with_ranks
from qrosa.train.rejoin import agree_on_best, check_same_everywhere, common_checkpoint
from qrosa.train.samples import Samples, make_samples
from qrosa.train.selection import sample_loss, selection_rows
from qrosa.train.trackers import Trackers, check_trackers, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel


def finetune(
    config: RunConfig, *, resume: bool = False, force: bool = False, callbacks: Iterable[Callback] = ()
) -> dict[str, Any]:
    """Fine-tune a model and write the run folder ``config.output``.

    Args:
        config: The settings.
        resume: Go on with the run that lies in the output folder, from its newest sound checkpoint.
        force: Start over in a folder that holds a run.
        callbacks: Told of everything that the run does, on its main process only.

    Returns:
        The contents of ``report.json``; empty on all processes but the main one.

    Raises:
        InputError: Bad settings, base, rows or output; a run to resume that is not the same run.
        DoesNotFitError: The memory asked for is not enough.
        TrainingError: Training diverged or taught the model nothing.
        StorageError: Damaged, unreadable or unwritable files.
        InterruptedRunError: A signal came, and a checkpoint was written.
    """
    folder = Path(config.output)
    ask_for_expandable_segments()
    fix_workspace()
    check_trackers(config.train.log_to)
    accelerator = make_accelerator(config.train.log_to, folder, config.train.timeout)
    machines = find_machines(config, accelerator)
    if machines is not None and machines.index:
        folder = machine_folder(folder, machines.index)
        config = dataclasses.replace(config, output=str(folder))
    listeners = Callbacks([*callbacks, Trackers(accelerator, folder)] if accelerator.is_main_process else [])
    try:
        with RunLock(folder) as lock, deterministic(config.train.deterministic == "on"):
            if resume and accelerator.is_main_process:
                check_output(folder, resume=True, force=False)
                lock.acquire()  # before anything is read: another process may be about to change it
            prepared = prepare(config, resume=resume, force=force, locked=resume)
            accelerator.wait_for_everyone()  # no process makes the folder before every one has found it free
            meter = MemoryMeter(with_index(accelerator.device), plan=prepared.plan)
            if config.train.base_rounding == "feedback":
                with meter.phase("quantise"):
                    base = feedback_base(prepared.config, prepared.train.rows, accelerator, listeners)
                prepared = dataclasses.replace(prepared, base_files=base)
            run = _Run(prepared, accelerator, listeners, lock, meter, machines)
            with held_to(run.device, prepared.cap, prepared.plan.beside):
                return run.go(resume=resume, force=force)
    finally:
        listeners.on_end()


def find_machines(config: RunConfig, accelerator: Accelerator) -> Machines | None:
    """Where this process stands, if machines are to step on their own.

    Raises:
        InputError: A machine would have nothing to do.
    """
    if config.train.sync_every == 1:
        return None
    if config.train.batch_size < accelerator.num_processes:
        raise InputError(
            f"a step of {config.train.batch_size} rows has none for some of {accelerator.num_processes} processes",
            f"raise --batch-size to {accelerator.num_processes} or more",
        )
    return Machines(accelerator, processes_on_this_host())


class _Run:
    """One run in the making: what is loaded, and where it goes."""

    def __init__(
        self,
        prepared: Prepared,
        accelerator: Accelerator,
        callbacks: Callbacks,
        lock: RunLock,
        meter: MemoryMeter,
        machines: Machines | None,
    ) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.callbacks = callbacks
        self.lock = lock
        self.folder = Path(self.config.output)
        self.accelerator = accelerator
        self.machines = machines
        self.writes = accelerator.is_main_process if machines is None else machines.leads
        self.device = meter.device
        self.meter = meter
        self.samples: Samples | None = None
        self.identity = {"settings": to_flat(self.config), "fingerprints": prepared.fingerprints()}

    def go(self, *, resume: bool, force: bool) -> dict[str, Any]:
        """Everything from loading the base to the report, in order; returns the report."""
        if self.machines is not None:
            if self.machines.count == 1:
                self.callbacks.on_notice("one machine meets nobody: --sync-every is for several")
            told = {**self.identity["settings"], "resume": resume}
            check_same_everywhere(self.machines, told, self.identity["fingerprints"])
        checkpoint = self._newest_checkpoint() if resume else None
        for text in (*self.prepared.plan.request.shape.all_notes, *self.prepared.told()):
            self.callbacks.on_notice(text)
        with self.meter.phase("load"):
            base = self._load()
        if self.device.type == "cpu":
            look_at_layers(base)
        if self.config.adapter.rank_by == "sensitivity":
            self._give_out_ranks(base, checkpoint)
        with self.meter.phase("load"):
            model = self._attach(base, checkpoint)
        set_speech(model, self.prepared.speech)
        # Only now: a damaged base shows when it is read, and must not leave a folder, nor cost --force a former run.
        self._open_folder(checkpoint, fresh=not resume, force=force)
        if self.config.train.base_rounding == "feedback":
            self._take_base_home(model)
        parts = self._parts(model, checkpoint)
        self.callbacks.on_start(self.identity["settings"], parts.state.step)
        if self.config.train.samples and self.accelerator.is_main_process:  # the others wait where they next meet
            self.samples = make_samples(self.prepared, self.callbacks.on_notice)
            if parts.state.step == 0:
                with self.meter.phase("eval"):
                    self.samples.before(parts.model)
        loop = TrainingLoop(parts, self.callbacks)
        try:
            loop.fit()
            loop.evaluate()
        finally:
            parts.optimizer.close()
        return self._finish(parts)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from; None where the run stopped before its first one."""
        if self.writes:
            # The main process was refused before if it has no run; another machine may join one.
            is_new = not (self.folder / CONFIG_FILE).is_file()
            open_folder(self.folder, self.lock, fresh=is_new, force=False)
            if is_new:
                self._write_settings()
            recover(self.folder)
        self.accelerator.wait_for_everyone()
        if self.machines is None:
            checkpoint = latest(self.folder, self.callbacks.on_notice)
        else:
            checkpoint = common_checkpoint(self.machines, self.folder, self.callbacks.on_notice)
        if checkpoint is None:
            self.callbacks.on_notice("the run has no checkpoint yet: it starts from the beginning")
        else:
            check_same_run(checkpoint, self.identity["settings"], self.identity["fingerprints"])
        return checkpoint

    def _write_settings(self) -> None:
        import yaml

        settings = with_absolute_places(self.identity["settings"])
        write_text(self.folder / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))

    def _open_folder(self, checkpoint: Checkpoint | None, *, fresh: bool, force: bool) -> None:
        if self.writes:
            open_folder(self.folder, self.lock, fresh=fresh, force=force)
            for notice in restore(self.folder, checkpoint.logs if checkpoint else {}):
                self.callbacks.on_notice(notice)
            if fresh:
                self._write_settings()
            if fresh or checkpoint is None:
                write_json(self.folder / PLAN_FILE, document(self.prepared.plan))
        self.accelerator.wait_for_everyone()

    def _take_base_home(self, model: PreTrainedModel) -> None:
        """A base that was made for the run lies in its folder, now that there is one."""
        if self.accelerator.is_main_process:
            take_home(self.config.output)
        self.accelerator.wait_for_everyone()
        name_home(self.config.output, model)

    def _load(self) -> PreTrainedModel:
        """The base in 4 bits."""
        return load_planned(
            self.prepared.base_files,
            self.prepared.plan.work,
            self.device,
            parse_offload(self.config.train.offload).disk,
            look_at_each(self.callbacks.phase("load")),
        )

    def _give_out_ranks(self, base: PreTrainedModel, checkpoint: Checkpoint | None) -> None:
        """Ranks by sensitivity: measured, or those of the run that goes on; and said, where they went."""
        if checkpoint is None:
            with self.meter.phase("select"):
                allocation = measure_ranks(self.prepared, base, self.accelerator, self.callbacks)
        else:
            allocation = stored_ranks(self.prepared, base, checkpoint)
        self.prepared = with_ranks(self.prepared, allocation)
        for line in self.prepared.plan.where:
            self.callbacks.on_notice(line)

    def _attach(self, model: PreTrainedModel, checkpoint: Checkpoint | None) -> PreTrainedModel:
        """Put the adapter on, new or from a checkpoint, ready to train."""
        config = self.config
        attach_adapter(model, config.adapter, config.train.seed, self.prepared.allocation)
        if checkpoint is not None:
            load_adapter(model, checkpoint.folder)
        elif config.adapter.low_rank_init == "svd" and self.prepared.allocation.low_rank_parameters:
            rows = self._selection_rows()
            for notice in init_low_rank(
                model,
                rows,
                limit=len(rows),
                seed=config.train.seed,
                base_files=self.prepared.original,
                progress=self.callbacks.phase("svd"),
            ):
                self.callbacks.on_notice(notice)
        return model

    def _parts(self, model: nn.Module, checkpoint: Checkpoint | None) -> LoopParts:
        prepared, train = self.prepared, self.config.train
        stand_in = OPTIMIZERS[train.optimizer].stand_in
        if stand_in is not None and self.device.type == "cpu":
            self.callbacks.on_notice(f"there is nothing to page on the CPU: {stand_in} runs")
        optimizer = self._optimizer(model)
        plan = prepared.plan.work
        state = RunState(Limits(plan.rows, plan.tokens), plan.eval_tokens, plan.loss_chunk_tokens)
        if checkpoint is not None:
            optimizer.load_state_tensors(checkpoint.optimizer_tensors())
            state = checkpoint.run
            check_best(train, state, self.folder, self.callbacks.on_notice)
            if self.machines is not None:
                agree_on_best(self.accelerator, state)
            self.meter.peaks = {**state.peaks, **self.meter.peaks}
            self.callbacks.on_notice(f"going on after step {state.step}")
        return LoopParts(
            config=self.config,
            phases=prepared.phases,
            folder=self.folder,
            model=model,
            optimizer=optimizer,
            rows=prepared.train.rows,
            heldout=prepared.heldout.rows if prepared.heldout else [],
            pad_id=prepared.pad_id,
            state=state,
            accelerator=self.accelerator,
            machines=self.machines,
            meter=self.meter,
            identity=self.identity,
            select=lambda advance: self._select(model, optimizer, advance),
            write_adapter=lambda folder: save_adapter(model, folder),
            planned=prepared.plan.planned,
        )

    def _optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of the parts that the model has: on the device, or DeepSpeed's."""
        train, settings = self.config.train, self.prepared.zero
        low_rank, sparse = adapter_parts(model)
        self._agree_on([*low_rank, *sparse])
        kind, decay = train.optimizer, train.weight_decay
        if self.machines is not None:
            return LocalStepsOptimizer(
                low_rank,
                sparse,
                machines=self.machines,
                outer_lr=train.outer_lr,
                outer_momentum=train.outer_momentum,
                kind=kind,
                weight_decay=decay,
            )
        if settings is None:
            return AdapterOptimizer(low_rank, sparse, kind=kind, weight_decay=decay, accelerator=self.accelerator)
        self.callbacks.on_notice(f"DeepSpeed: {settings.words}, {self.accelerator.num_processes} processes")
        return ZeroOptimizer(
            low_rank,
            sparse,
            settings=settings,
            weight_decay=decay,
            max_norm=train.max_grad_norm,
            accelerator=self.accelerator,
        )

    def _select(self, model: nn.Module, optimizer: Optimizer, advance: Advance) -> tuple[int, int]:
        """Pick the masks and hand the new sparse part to the optimizer."""
        config, prepared = self.config, self.prepared
        rows = self._selection_rows()
        original = prepared.original
        positions = choose_positions(
            model,
            rows,
            config=config.masks,
            nnz=prepared.allocation.nnz,
            seed=config.train.seed,
            group_bytes=prepared.plan.work.mask_group_bytes or None,
            candidate_factor=prepared.plan.work.mask_candidates or None,
            progress=advance,
            loss=sample_loss(prepared.plan.work.loss_chunk_tokens),
            base_files=original,
        )
        agreed = agree(self.accelerator, list(positions.values()))
        notices = set_masks(
            model,
            dict(zip(positions, agreed, strict=True)),
            init=config.adapter.sparse_init,
            low_rank_repairs=config.adapter.low_rank_init == "svd",
            base_files=original if config.adapter.sparse_init == "residual" else None,
        )
        for notice in notices:
            self.callbacks.on_notice(notice)
        sparse = adapter_parts(model)[1]
        self._agree_on(sparse)
        optimizer.add_sparse(sparse)
        return sum(len(row.input_ids) for row in rows), sum(supervised_tokens(row) for row in rows)

    @torch.no_grad()
    def _agree_on(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the main process's values of these parameters."""
        for parameter, value in zip(parameters, agree(self.accelerator, parameters), strict=True):
            parameter.copy_(value)

    def _selection_rows(self) -> list[Any]:
        return selection_rows(self.prepared.train.wanted, self.config.masks.mask_samples, self.config.train.seed)

    def _finish(self, parts: LoopParts) -> dict[str, Any]:
        """Save the adapter, the last or the best, and write the report."""
        best = kept_step(self.config.train, parts.state)
        with self.meter.phase("save"):
            # The first machine has the checkpoint; one that came later need not, and writes nothing here.
            if best is not None and best != parts.state.step and (self.machines is None or not self.machines.index):
                take_values(parts.model, step_folder(self.folder, best))
            if self.accelerator.is_main_process:
                save_adapter(parts.model, self.folder / ADAPTER_FOLDER)
        answered: list[dict[str, Any]] = []
        if self.samples is not None:
            with self.meter.phase("eval"):
                answered = self.samples.after(parts.model)
        parts.state.peaks = dict(self.meter.peaks)
        facts = Facts(
            settings=self.identity["settings"],
            base=dataclasses.asdict(parts.model.qrosa_base),  # type: ignore[call-overload]
            phases=self.prepared.phases,
            state=parts.state,
            planned=self.prepared.plan.planned,
            modules=module_shares(parts.model),
            where=self.prepared.plan.where,
            data=self.prepared.data_report(),
            trainable=sum(part.size for part in parts.optimizer.parts.values()),
            deterministic=self.config.train.deterministic == "on",
            overhead=dataclasses.asdict(self.prepared.plan.work.overhead) if self.device.type == "cuda" else {},
            fingerprints=self.identity["fingerprints"],
            samples=answered,
            machine=describe_machine(self.device, self.accelerator.num_processes),
        )
        report = write_report(self.folder, facts) if self.accelerator.is_main_process else {}
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # closes trackers and the other processes' group: nothing may follow
        return report


def module_shares(model: nn.Module) -> list[ModuleShare]:
    """What each matrix of a model got of the adapter."""
    from qrosa.adapters.rank_units import layer_index

    shares = []
    for path, layer in quantized_linears(model).items():
        values = layer.sparse_values
        rms = float(values.detach().square().mean().sqrt()) if values is not None and values.numel() else 0.0
        size = layer.in_features * layer.out_features
        shares.append(ModuleShare(path, layer_index(path), layer.rank, layer.nnz, size, rms))
    return shares
