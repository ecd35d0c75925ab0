"""The training loop: warm-up, mask selection, joint training, with evaluations and checkpoints in between.

A step is a function of (seed, step, adapter, optimizer state): which rows it takes, how they are cut into micro-batches
and which units dropout zeroes all follow from the seed and the step. A run can therefore stop after any step and go
on bit for bit from a checkpoint.

Several processes (started by ``torchrun``, ``accelerate launch`` or ``deepspeed``) each compute their share of a
step's rows; then the optimizer sums the two flat gradients over them, and nothing else travels. Where machines step on
their own, only the processes of one machine do that, and what all must do together waits for a meeting. There is no
DistributedDataParallel wrapper: it would hook every parameter and all-reduce per micro-batch what travels here once a
step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qrosa.adapters.inject import ramp_low_rank
from qrosa.config import RunConfig
from qrosa.data.batching import Limits, supervised_tokens
from qrosa.data.order import step_rows
from qrosa.errors import InterruptedRunError
from qrosa.optim.machines import Machines, Processes
from qrosa.optim.parts import Optimizer
from qrosa.optim.schedule import Phases, learning_rate_factor, sparse_learning_rate_factor, steps_between_saves
from qrosa.record.checkpoint import checkpoint_steps, prune, save_checkpoint, step_folder
from qrosa.record.logs import EVAL_FILE, METRICS_FILE, StepRecord, append_line, log_sizes
from qrosa.record.meter import MemoryMeter
from qrosa.record.state import RunState
from qrosa.report.words import stop_words
from qrosa.train import guard
from qrosa.train.best import is_best_now, kept_step, note_evaluation, out_of_patience
from qrosa.train.callbacks import Advance, Callbacks
from qrosa.train.evaluate import add_up, evaluate, machine_share, own_share
from qrosa.train.interrupt import Interrupts
from qrosa.train.meetings import Meetings
from qrosa.train.preferences import make_runner

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qrosa.data.encode import EncodedRow


@dataclass
class LoopParts:
    """What a training loop works on.

    Attributes:
        config: The run's settings.
        phases: Length of the phases.
        folder: The run folder.
        model: The base with its adapters.
        optimizer: Owner of masters and gradients.
        rows: Training rows.
        heldout: Rows to evaluate on; may be empty.
        pad_id: Token to pad with.
        state: What changes.
        accelerator: Device, and the other processes.
        machines: Where this process stands, if machines step on their own; the optimizer is then one for that.
        meter: Memory peaks.
        identity: ``settings`` and ``fingerprints``, stored with each checkpoint.
        select: Picks the masks and returns (tokens, supervised tokens) that it read; called once, with what is told of
            (samples done, samples to do) and may end it by raising.
        write_adapter: Saves the adapter into a folder.
        planned: Phase -> bytes of the plan.
    """

    config: RunConfig
    phases: Phases
    folder: Path
    model: nn.Module
    optimizer: Optimizer
    rows: Sequence[EncodedRow]
    heldout: Sequence[EncodedRow]
    pad_id: int
    state: RunState
    accelerator: Accelerator
    meter: MemoryMeter
    identity: Mapping[str, Any]
    select: Callable[[Advance], tuple[int, int]]
    write_adapter: Callable[[Path], None]
    planned: Mapping[str, int]
    machines: Machines | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder: the main one, or each machine's first."""
        return self.machines.leads if self.machines is not None else bool(self.accelerator.is_main_process)

    @property
    def together(self) -> Processes:
        """The processes that share each step: all, or those of one machine."""
        return self.machines or self.accelerator


class TrainingLoop:
    """Runs the steps that are left of a run.

    Args:
        parts: Model, data, settings and state.
        callbacks: Told of each step, evaluation, checkpoint and notice.
    """

    def __init__(self, parts: LoopParts, callbacks: Callbacks) -> None:
        self.parts = parts
        self.callbacks = callbacks
        self.zero_gradients = guard.ZeroGradientGuard()
        self.meetings = Meetings(parts.config.train, parts.phases, parts.state, parts.optimizer, callbacks.on_notice)
        self._saved = parts.state.step  # the step that the newest checkpoint is of; nothing is lost at step 0
        self.runner = make_runner(
            parts.config.train,
            parts.model,
            parts.optimizer,
            limits=parts.state.limits,
            pad_id=parts.pad_id,
            seed=parts.config.train.seed,
            device=parts.accelerator.device,
            chunk_tokens=parts.state.chunk_tokens,
            process=parts.accelerator.process_index,
            packed=parts.config.train.packing == "on",
            on_shrink=self._shrunk,
            add_up=partial(add_up, parts.together),
        )

    def fit(self) -> None:
        """Run to the last step, or until the held-out loss has not come down for ``stop_after`` evaluations.

        A checkpoint is written every ``save_every`` steps, after the last one, before masks are picked, which takes as
        long as several steps, and with ``keep_best`` at each evaluation that is the best so far.

        Raises:
            TrainingError: The loss diverged, or nothing is learnt.
            InterruptedRunError: A signal came; no step that was done is lost.
            DoesNotFitError: A single row does not fit the memory.
        """
        parts, state = self.parts, self.parts.state
        self._remember_start()
        self._ramp()
        if state.step and not self._done:
            state.resumed_at.append(state.step)
        parts.model.train()
        with Interrupts() as interrupts:
            while not self._done:
                if parts.phases.sparse and state.selected_at is None and state.step >= parts.phases.warmup:
                    self._select(interrupts)
                else:
                    self._step()
                    if not self.meetings.after_step(interrupts.requested):
                        continue
                    if self.meetings.due(parts.config.train.eval_every):
                        self.evaluate()
                stop = self._any_process(interrupts.requested is not None)
                if stop or self._done or self.meetings.due(self._save_every) or self._best_is_unsaved:
                    self.save()
                if stop and not self._done:
                    raise InterruptedRunError(
                        f"stopped by {interrupts.requested or 'a signal to another process'} after step {state.step}",
                        f"go on with: qrosa finetune --resume --output {parts.folder}",
                    )
        if state.step < parts.phases.total:
            self.callbacks.on_notice(stop_words(state.step, parts.phases.total, state.since_best, state.best["step"]))
        guard.check_changed(state.digests, parts.optimizer.digests())

    def evaluate(self) -> None:
        """Measure the loss of the held-out rows, log it and keep it as the run's latest."""
        parts, state = self.parts, self.parts.state
        if not parts.heldout or state.evaluation.get("step") == state.step:
            return
        with parts.meter.phase("eval"):
            result, tokens = evaluate(
                parts.model,
                parts.heldout,
                max_tokens=state.eval_tokens,
                pad_id=parts.pad_id,
                accelerator=parts.accelerator,
                train=parts.config.train,
                progress=self.callbacks.phase("eval"),
            )
        if tokens != state.eval_tokens:
            self._note_change("eval", {"tokens": state.eval_tokens}, {"tokens": tokens})
            state.eval_tokens = tokens
        state.evaluation = {"step": state.step, **result}
        if parts.writes:
            append_line(parts.folder / EVAL_FILE, state.evaluation)
        self.callbacks.on_evaluation(state.step, result)
        if state.selected_at is not None or not parts.phases.sparse:
            note_evaluation(state, result)

    def save(self) -> None:
        """Write a checkpoint of now and delete the oldest ones beyond ``keep``."""
        parts, state = self.parts, self.parts.state
        with parts.meter.phase("save"):
            optimizer = parts.optimizer.state_tensors(wanted=parts.writes)
            if parts.writes:
                state.peaks = dict(parts.meter.peaks)
                save_checkpoint(
                    parts.folder,
                    state,
                    write_adapter=parts.write_adapter,
                    optimizer=optimizer,
                    logs=log_sizes(parts.folder),
                    **parts.identity,
                )
        self._saved = state.step
        self.callbacks.on_save(state.step, step_folder(parts.folder, state.step))
        parts.accelerator.wait_for_everyone()
        if parts.writes:  # only now: machines go on from the newest step that all of them have
            prune(parts.folder, parts.config.train.keep, spare=kept_step(parts.config.train, state))

    def _step(self) -> None:
        """One optimizer step: gradients, checks, update, a line in the log."""
        parts, state, train = self.parts, self.parts.state, self.parts.config.train
        begun = time.perf_counter()
        step, phase = state.step, self._phase
        group = train.goal.group
        places = step_rows(len(parts.rows) // group, train.batch_size, step, train.seed)
        rows = [parts.rows[place * group + member] for place in places for member in range(group)]
        supervised = sum(supervised_tokens(row) for row in rows)
        guard.check_supervised(supervised, step + 1)
        self._ramp()
        mine = rows if parts.machines is None else machine_share(rows, group, parts.machines)
        learnt = supervised if mine is rows else sum(supervised_tokens(row) for row in mine)
        count = len(mine) // group if train.goal.compares else max(1, learnt)  # a machine may get none of the tokens
        with parts.meter.phase("train"):
            share = own_share(rows, group, parts.accelerator)
            loss = add_up(parts.together, [self.runner.gradients(share, step, count)])[0] / count
            if self.zero_gradients.watches(parts.optimizer.parts):
                self.zero_gradients.see(parts.optimizer.gradient_norms())
            lr, sparse_lr = self._learning_rates(step)
            guard.check_finite(loss, 0.0, step + 1, self._last_good())
            norm = parts.optimizer.update(lr=lr, sparse_lr=sparse_lr, max_norm=train.max_grad_norm)
            guard.check_finite(loss, norm, step + 1, self._last_good())
            memory = parts.meter.peak()
        seconds = time.perf_counter() - begun
        state.step += 1
        state.seconds += seconds
        tokens = sum(len(row.input_ids) for row in rows)
        state.tokens += tokens
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.last_loss = loss
        record = self._record(phase, tokens, supervised, seconds, memory, loss=loss, lr=lr, norm=norm)
        self._log(record)
        self.callbacks.on_step(record)

    def _ramp(self) -> None:
        """Set the scale of low-rank parts that do not start with all of it, for the step that comes."""
        parts = self.parts
        ramp_low_rank(parts.model, parts.config.adapter.alpha, parts.state.step, parts.phases.total)

    def _record(
        self,
        phase: str,
        tokens: int,
        supervised: int,
        seconds: float,
        memory: int,
        *,
        loss: float | None = None,
        lr: float = 0.0,
        norm: float | None = None,
    ) -> StepRecord:
        """The record of what was just done, and how long the rest of the run will take."""
        state, total = self.parts.state, self.parts.phases.total
        return StepRecord(
            step=state.step,
            phase=phase,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            supervised_tokens=supervised,
            tokens_per_s=tokens / seconds,
            memory=memory,
            total=total,
            planned=self.parts.planned.get("select" if phase == "select" else "train"),
            seconds_left=(total - state.step) * state.seconds / max(1, state.step),
        )

    def _log(self, record: StepRecord) -> None:
        if self.parts.writes:
            append_line(self.parts.folder / METRICS_FILE, record.line())

    def _select(self, interrupts: Interrupts) -> None:
        """Pick the masks; from here on the sparse part is trained too. A signal ends it after the sample at hand."""
        parts, state = self.parts, self.parts.state
        if self._saved != state.step:
            self.save()

        def report(done: int, total: int) -> None:
            self.callbacks.on_phase("select", done, total)
            if interrupts.requested is not None and done < total:
                raise self._stopped_in_selection(interrupts.requested)

        begun = time.perf_counter()
        with parts.meter.phase("select"):
            tokens, supervised = parts.select(report)
            memory = parts.meter.peak()
        parts.model.train()
        state.selected_at = state.step
        self._remember_start()
        self._log(self._record("select", tokens, supervised, time.perf_counter() - begun, memory))

    def _stopped_in_selection(self, signal: str) -> InterruptedRunError:
        """Not agreed on with other processes, which may be at another sample: their launcher ends them."""
        step, folder = self.parts.state.step, self.parts.folder
        last = f"the last checkpoint is {step_folder(folder, step)}" if step else "there is no checkpoint yet"
        return InterruptedRunError(
            f"stopped by {signal} while masks were picked, after step {step}; {last}",
            f"go on with: qrosa finetune --resume --output {folder}",
        )

    def _remember_start(self) -> None:
        """Keep the digest of each part as it was before its first step."""
        known = self.parts.state.digests
        known.update({part: d for part, d in self.parts.optimizer.digests().items() if part not in known})

    def _learning_rates(self, step: int) -> tuple[float, float]:
        train, total = self.parts.config.train, self.parts.phases.total
        low_rank = learning_rate_factor(step, total, train.schedule, train.lr_warmup)
        sparse = sparse_learning_rate_factor(
            step, total, train.schedule, train.lr_warmup, self.parts.state.selected_at or 0
        )
        assert train.lr is not None and train.sparse_lr is not None  # chosen before the run began
        return train.lr * low_rank, train.sparse_lr * sparse

    def _sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        return add_up(self.parts.accelerator, [value])[0]

    def _any_process(self, flag: bool) -> bool:
        return self._sum(float(flag)) > 0

    @property
    def _phase(self) -> str:
        return self.parts.phases.phase(self.parts.state.step)

    @property
    def _done(self) -> bool:
        """The last step is done, or the held-out loss has not come down for as long as was asked."""
        return self.parts.state.step >= self.parts.phases.total or out_of_patience(
            self.parts.config.train, self.parts.state
        )

    @property
    def _best_is_unsaved(self) -> bool:
        state = self.parts.state
        return self.parts.config.train.keep_best and is_best_now(state) and self._saved != state.step

    @property
    def _save_every(self) -> int:
        return steps_between_saves(self.parts.config.train, self.parts.phases.total)

    def _last_good(self) -> str | None:
        steps = checkpoint_steps(self.parts.folder)
        return str(step_folder(self.parts.folder, steps[0])) if steps else None

    def _shrunk(self, step: int, before: Limits, after: Limits) -> None:
        self.parts.state.limits = after
        self._note_change(
            "train", {"rows": before.rows, "tokens": before.tokens}, {"rows": after.rows, "tokens": after.tokens}
        )

    def _note_change(self, where: str, before: dict[str, int], after: dict[str, int]) -> None:
        step = self.parts.state.step + (1 if where == "train" else 0)
        self.parts.state.changes.append({"step": step, "where": where, "from": before, "to": after})
        self.callbacks.on_notice(
            f"out of memory at step {step} ({where}): the micro-batch goes from {before} to {after}; "
            "the effective batch stays, and no finished step is lost"
        )
