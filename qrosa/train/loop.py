"""The training loop: warm-up, mask selection, joint training, with evaluations and checkpoints in between.

A step is a function of (seed, step, adapter, optimizer state): which rows it takes, how they are cut into micro-batches
and which units dropout zeroes all follow from the seed and the step. A run can therefore stop after any step and go
on bit for bit from a checkpoint.

Several processes (started by ``torchrun``, ``accelerate launch`` or ``deepspeed``) each compute their share of a
step's rows; then the optimizer sums the two flat gradients over them, and nothing else travels. There is no
DistributedDataParallel wrapper: it would hook every parameter and all-reduce per micro-batch what travels here once a
step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qrosa.data.batching import Limits, step_rows, supervised_tokens
from qrosa.errors import InterruptedRunError
from qrosa.optim.schedule import learning_rate_factor, sparse_learning_rate_factor
from qrosa.record.checkpoint import checkpoint_steps, prune, save_checkpoint, step_folder
from qrosa.record.folder import EVAL_FILE, METRICS_FILE, append_line, size_of
from qrosa.train import guard
from qrosa.train.evaluate import evaluate
from qrosa.train.interrupt import Interrupts
from qrosa.train.progress import Progress, StepLine
from qrosa.train.step import StepRunner
from qrosa.train.work import Work, metrics_line

if TYPE_CHECKING:
    from qrosa.data.encode import EncodedRow


class TrainingLoop:
    """Runs the steps that are left of a run.

    Args:
        work: Model, data, settings and state.
        progress: Told of each step, evaluation and notice.
    """

    def __init__(self, work: Work, progress: Progress) -> None:
        self.work = work
        self.progress = progress
        self.zero_gradients = guard.ZeroGradientGuard()
        self._saved = work.state.step  # the step that the newest checkpoint is of; nothing is lost at step 0
        self.runner = StepRunner(
            work.model,
            work.optimizer,
            limits=work.state.limits,
            pad_id=work.pad_id,
            seed=work.config.train.seed,
            device=work.accelerator.device,
            chunk_tokens=work.state.chunk_tokens,
            process=work.accelerator.process_index,
            on_shrink=self._shrunk,
        )

    def fit(self) -> None:
        """Run to the last step.

        A checkpoint is written every ``save_every`` steps, after the last one, and before masks are picked, which
        takes as long as several steps.

        Raises:
            TrainingError: The loss diverged, or nothing is learnt.
            InterruptedRunError: A signal came; no step that was done is lost.
            DoesNotFitError: A single row does not fit the memory.
        """
        work, state = self.work, self.work.state
        self._remember_start()
        work.model.train()
        with Interrupts() as interrupts:
            while state.step < work.phases.total:
                if work.phases.sparse and state.selected_at is None and state.step >= work.phases.warmup:
                    self._select(interrupts)
                else:
                    self._step()
                    if self._due(work.config.train.eval_every):
                        self.evaluate()
                stop = self._any_process(interrupts.requested is not None)
                if stop or state.step == work.phases.total or self._due(self._save_every):
                    self.save()
                if stop and state.step < work.phases.total:
                    raise InterruptedRunError(
                        f"stopped by {interrupts.requested or 'a signal to another process'} after step {state.step}",
                        f"go on with: qrosa finetune --resume --output {work.folder}",
                    )
        guard.check_changed(state.digests, work.optimizer.digests())

    def evaluate(self) -> None:
        """Measure the loss of the held-out rows, log it and keep it as the run's latest."""
        work, state = self.work, self.work.state
        if not work.heldout or state.evaluation.get("step") == state.step:
            return
        with work.meter.phase("eval"):
            result, tokens = evaluate(
                work.model,
                work.heldout,
                max_tokens=state.eval_tokens,
                pad_id=work.pad_id,
                accelerator=work.accelerator,
                progress=lambda done, total: self.progress.stage("eval", done, total),
            )
        if tokens != state.eval_tokens:
            self._note_change("eval", {"tokens": state.eval_tokens}, {"tokens": tokens})
            state.eval_tokens = tokens
        state.evaluation = {"step": state.step, **result}
        if work.accelerator.is_main_process:
            append_line(work.folder / EVAL_FILE, state.evaluation)
        work.accelerator.log({"eval_loss": result["loss"], "eval_perplexity": result["perplexity"]}, step=state.step)
        self.progress.evaluated(state.step, result["loss"], result["perplexity"])

    def save(self) -> None:
        """Write a checkpoint of now and delete the oldest ones beyond ``keep``."""
        work, state = self.work, self.work.state
        with work.meter.phase("save"):
            optimizer = work.optimizer.state_tensors(wanted=work.accelerator.is_main_process)
            if work.accelerator.is_main_process:
                state.peaks = dict(work.meter.peaks)
                logs = {name: size_of(work.folder / name) for name in (METRICS_FILE, EVAL_FILE)}
                save_checkpoint(
                    work.folder,
                    state.step,
                    write_adapter=work.write_adapter,
                    optimizer=optimizer,
                    state={**work.identity, "phase": self._phase, "run": state.to_json(), "logs": logs},
                )
                prune(work.folder, work.config.train.keep)
        self._saved = state.step
        work.accelerator.wait_for_everyone()

    def _step(self) -> None:
        """One optimizer step: gradients, checks, update, a line in the log."""
        work, state, train = self.work, self.work.state, self.work.config.train
        begun = time.perf_counter()
        step, phase = state.step, self._phase
        rows = [work.rows[i] for i in step_rows(len(work.rows), train.batch_size, step, train.seed)]
        supervised = sum(supervised_tokens(row) for row in rows)
        guard.check_supervised(supervised, step + 1)
        with work.meter.phase("train"):
            share = rows[work.accelerator.process_index :: work.accelerator.num_processes]
            loss = self._sum(self.runner.gradients(share, step, supervised)) / supervised
            if self.zero_gradients.watches(work.optimizer.parts):
                self.zero_gradients.see(work.optimizer.gradient_norms())
            lr, sparse_lr = self._learning_rates(step)
            guard.check_finite(loss, 0.0, step + 1, self._last_good())
            norm = work.optimizer.update(lr=lr, sparse_lr=sparse_lr, max_norm=train.max_grad_norm)
            guard.check_finite(loss, norm, step + 1, self._last_good())
            memory = work.meter.peak()
        state.step += 1
        self._log_step(rows, supervised, loss, lr, norm, memory, phase, time.perf_counter() - begun)

    def _log_step(
        self,
        rows: Sequence[EncodedRow],
        supervised: int,
        loss: float,
        lr: float,
        norm: float,
        memory: int,
        phase: str,
        seconds: float,
    ) -> None:
        work, state = self.work, self.work.state
        tokens = sum(len(row.input_ids) for row in rows)
        state.seconds += seconds
        state.tokens += tokens
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.last_loss = loss
        line = metrics_line(state.step, phase, loss, lr, norm, tokens, supervised, tokens / seconds, memory)
        if work.accelerator.is_main_process:
            append_line(work.folder / METRICS_FILE, line)
        work.accelerator.log({k: v for k, v in line.items() if k not in ("step", "phase")}, step=state.step)
        left = (work.phases.total - state.step) * state.seconds / state.step
        planned = work.planned.get("train")
        self.progress.step(
            StepLine(state.step, work.phases.total, phase, loss, tokens / seconds, memory, planned, left)
        )

    def _select(self, interrupts: Interrupts) -> None:
        """Pick the masks; from here on the sparse part is trained too. A signal ends it after the sample at hand."""
        work, state = self.work, self.work.state
        if self._saved != state.step:
            self.save()

        def report(done: int, total: int) -> None:
            self.progress.stage("select", done, total)
            if interrupts.requested is not None and done < total:
                raise self._stopped_in_selection(interrupts.requested)

        begun = time.perf_counter()
        with work.meter.phase("select"):
            tokens, supervised = work.select(report)
            memory = work.meter.peak()
        work.model.train()
        state.selected_at = state.step
        self._remember_start()
        seconds = time.perf_counter() - begun
        if work.accelerator.is_main_process:
            line = metrics_line(state.step, "select", None, 0.0, None, tokens, supervised, tokens / seconds, memory)
            append_line(work.folder / METRICS_FILE, line)

    def _stopped_in_selection(self, signal: str) -> InterruptedRunError:
        """Not agreed on with other processes, which may be at another sample: their launcher ends them."""
        step, folder = self.work.state.step, self.work.folder
        last = f"the last checkpoint is {step_folder(folder, step)}" if step else "there is no checkpoint yet"
        return InterruptedRunError(
            f"stopped by {signal} while masks were picked, after step {step}; {last}",
            f"go on with: qrosa finetune --resume --output {folder}",
        )

    def _remember_start(self) -> None:
        """Keep the digest of each part as it was before its first step."""
        known = self.work.state.digests
        known.update({part: d for part, d in self.work.optimizer.digests().items() if part not in known})

    def _learning_rates(self, step: int) -> tuple[float, float]:
        train, total = self.work.config.train, self.work.phases.total
        low_rank = learning_rate_factor(step, total, train.schedule, train.lr_warmup)
        sparse = sparse_learning_rate_factor(
            step, total, train.schedule, train.lr_warmup, self.work.state.selected_at or 0
        )
        return train.lr * low_rank, train.sparse_lr * sparse

    def _sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        accelerator = self.work.accelerator
        if accelerator.num_processes == 1:
            return value
        return float(accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=accelerator.device)))

    def _any_process(self, flag: bool) -> bool:
        return self._sum(float(flag)) > 0

    @property
    def _phase(self) -> str:
        return self.work.phases.phase(self.work.state.step)

    @property
    def _save_every(self) -> int:
        return self.work.config.train.save_every or max(1, self.work.phases.total // 10)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.work.state.step > 0 and self.work.state.step % every == 0

    def _last_good(self) -> str | None:
        steps = checkpoint_steps(self.work.folder)
        return str(step_folder(self.work.folder, steps[0])) if steps else None

    def _shrunk(self, step: int, before: Limits, after: Limits) -> None:
        self.work.state.limits = after
        self._note_change(
            "train", {"rows": before.rows, "tokens": before.tokens}, {"rows": after.rows, "tokens": after.tokens}
        )

    def _note_change(self, where: str, before: dict[str, int], after: dict[str, int]) -> None:
        step = self.work.state.step + (1 if where == "train" else 0)
        self.work.state.changes.append({"step": step, "where": where, "from": before, "to": after})
        self.progress.notice(
            f"out of memory at step {step} ({where}): the micro-batch goes from {before} to {after}; "
            "the effective batch stays, and no finished step is lost"
        )
