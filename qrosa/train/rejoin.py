"""Machines that step on their own and come together again, each with checkpoints of its own: where do they go on?

Every machine writes a whole checkpoint at a meeting, its own AdamW states in it, before any goes on. A run therefore
goes on from the newest step that all of them have, and repeats what was done since to the bit. A machine that has none,
because it is new or has lost its disk, is sent the first machine's and goes on with those states.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError
from qrosa.files import put_in_place, write_fault
from qrosa.optim.machines import Machines
from qrosa.record.checkpoint import (
    FILES,
    FREE_SETTINGS,
    PLACES,
    STATE_FILE,
    Checkpoint,
    checkpoint_steps,
    is_sound,
    latest,
    open_checkpoint,
    step_folder,
)
from qrosa.record.state import RunState
from qrosa.train.agree import agree_on_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

_LISTED = 16  # newest checkpoints that machines tell each other of
_NONE = -1
# What all machines must do at the same steps is not free here; how the first one collects statistics is its own affair.
_FREE = (FREE_SETTINGS - {"save_every", "eval_every"}) | set(PLACES) | {"mask_selection"}


def check_same_everywhere(machines: Machines, settings: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuse machines that were started with other settings, another base or other rows than the first one.

    Raises:
        InputError: On every machine; those that differ say in what.
    """
    own = {name: value for name, value in settings.items() if name not in _FREE} | {
        f"the {name}": value for name, value in fingerprints.items()
    }
    first = json.loads(agree_on_bytes(machines.accelerator, json.dumps(own).encode()))
    other = [name for name, value in json.loads(json.dumps(own)).items() if first.get(name) != value]
    told = machines.gather([float(bool(other))])[:: machines.num_processes]
    hint = "start every machine with the same settings and copies of the same files"
    if other:
        what = other[0] if other[0].startswith("the ") else "--" + other[0].replace("_", "-")
        raise InputError(f"{what} is not the same on this machine as on the first one", hint)
    if [1.0] in told:
        raise InputError(f"machine {told.index([1.0]) + 1} was started with other settings than the first one", hint)


def common_checkpoint(machines: Machines, run: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of this machine that the run goes on from; None where the first machine has none.

    Args:
        machines: Which must all call this.
        run: This machine's run folder.
        notice: Told of damaged checkpoints and of machines that had to be sent one.

    Raises:
        StorageError: The first machine's checkpoints are all damaged; one that was sent cannot be written.
    """
    accelerator = machines.accelerator
    if accelerator.is_main_process:
        latest(run, notice)
    sound = [step for step in checkpoint_steps(run) if is_sound(run, step)][:_LISTED]
    padded = [*map(float, sound), *[float(_NONE)] * (_LISTED - len(sound))]
    held = [{int(step) for step in row if step >= 0} for row in machines.gather(padded)]
    step = newest_common(held)
    if step is None:
        return None
    lacking = [index for index, steps in enumerate(held[:: machines.num_processes]) if step not in steps]
    if lacking:
        names = ", ".join(str(index + 1) for index in lacking)
        notice(f"machine {names} has no checkpoint of step {step} and is sent the first machine's")
        files = {name: _sent(accelerator, step_folder(run, step) / name) for name in (*FILES, STATE_FILE)}
        if machines.leads and machines.index in lacking:
            _put(run, step, files)
        accelerator.wait_for_everyone()
    return open_checkpoint(run, step)


def newest_common(held: list[set[int]]) -> int | None:
    """The newest step that the first process and all others that have any have, or else the first's newest.

    Args:
        held: Steps of the sound checkpoints of each process.
    """
    first, others = held[0], [steps for steps in held if steps]
    return max(first.intersection(*others), default=max(first, default=None))


def _sent(accelerator: Accelerator, path: Path) -> bytes:
    """The first machine's file."""
    return agree_on_bytes(accelerator, path.read_bytes() if accelerator.is_main_process else b"")


def _put(run: Path, step: int, files: Mapping[str, bytes]) -> None:
    final = step_folder(run, step)
    draft = final.parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, data in files.items():
            (draft / name).write_bytes(data)
        if final.exists():  # damaged
            shutil.rmtree(final)
        put_in_place(draft, final)
    except OSError as error:
        raise write_fault(final, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def agree_on_best(accelerator: Accelerator, state: RunState) -> None:
    """Give every machine the first one's memory of the best evaluation: stopping is decided by it, on all at once."""
    known = agree_on_bytes(accelerator, json.dumps([state.best, state.since_best]).encode())
    state.best, state.since_best = json.loads(known)
