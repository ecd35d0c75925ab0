"""The best evaluation of a run: what is remembered of it, when a run stops for want of a better one, and what is kept.

Held-out loss is compared at the evaluations from mask selection on; those of the warm-up are of a model without its
sparse part and do not count. The best one and the number of those since are part of the run's state, so a resumed run
stops where it would have stopped.

With ``keep_best`` a checkpoint is written at each best evaluation and spared when older ones are deleted: what the run
ends with is the adapter of that checkpoint. No copy of its own has to be kept in step with the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrosa.adapters.inject import quantized_linears
from qrosa.config import RunConfig, TrainConfig
from qrosa.errors import InputError
from qrosa.record.checkpoint import is_sound
from qrosa.record.state import RunState
from qrosa.sparse.store import read_adapter


def check_held_out(config: RunConfig) -> None:
    """Refuse settings that read held-out rows where none are held out.

    Raises:
        InputError: They do.
    """
    flags = {"--stop-after": config.train.stop_after is not None, "--keep-best": config.train.keep_best}
    flags["--samples"] = config.train.samples > 0
    asked = [flag for flag, given in flags.items() if given]
    if asked and config.data.eval_data is None and config.data.eval_split is None:
        raise InputError(
            f"{asked[0]} reads held-out rows, and none are held out",
            "add --eval-split 5%, or --eval-data FILE",
        )


def note_evaluation(state: RunState, result: Mapping[str, Any]) -> None:
    """Count an evaluation that was just done after ``state.step`` steps: the best so far, or one more that is not."""
    loss = float(result["loss"])
    if not state.best or loss < state.best["loss"] or math.isnan(state.best["loss"]):
        state.best, state.since_best = {"step": state.step, **result}, 0
    else:
        state.since_best += 1


def is_best_now(state: RunState) -> bool:
    """Whether the best evaluation is of the step that the run is at."""
    return state.best.get("step") == state.step


def out_of_patience(train: TrainConfig, state: RunState) -> bool:
    """Whether as many evaluations as were asked for have passed without a better one."""
    return train.stop_after is not None and state.since_best >= train.stop_after


def kept_step(train: TrainConfig, state: RunState) -> int | None:
    """The step whose checkpoint must stay, for its adapter is what the run would end with now."""
    return state.best.get("step") if train.keep_best else None


def check_best(train: TrainConfig, state: RunState, folder: Path, notice: Callable[[str], None]) -> None:
    """Let a run that goes on look for the best anew if the checkpoint of the one it knows is lost."""
    step = kept_step(train, state)
    if step is None or is_sound(folder, step):
        return
    notice(f"the checkpoint of the best evaluation, step-{step}, is gone or damaged: the best is looked for anew")
    state.best, state.since_best = {}, 0


@torch.no_grad()
def take_values(model: nn.Module, checkpoint: Path) -> None:
    """Give the adapter the values of a checkpoint of the same run, in place: the device holds nothing twice.

    Raises:
        StorageError: The checkpoint's adapter is damaged.
    """
    saved, _ = read_adapter(checkpoint)
    for path, layer in quantized_linears(model).items():
        for name, tensor in layer.adapter_tensors().items():
            if tensor.is_floating_point():  # positions are picked once, before any evaluation that counts
                tensor.copy_(saved[f"{path}.{name}"])
