"""What the commands on finished models share: the device, a progress bar, and loading with both.

Torch-free at import, like every command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, int], None]


def choose_device(asked: str | None) -> str:
    """The device that was asked for, or the card if there is one.

    Raises:
        InputError: No such device here.
    """
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"--device {asked!r} is no device", "use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {asked!r} is not supported", "use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            f"--device {asked} is not here: {found} CUDA devices found", "'qrosa doctor' says why; or use --device cpu"
        )
    return str(device)


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Advance]:
    """A bar on a terminal, one line in a log; the callback takes what is done and what there is in all."""
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def load(source: str, device: str | None, console: Console) -> tuple[Any, Any, Path | None]:
    """Load a run, an adapter or a bare model, with a bar: model, tokenizer, and the adapter's folder if any.

    Raises:
        InputError: Nothing that can be loaded.
        StorageError: Damaged files.
    """
    from qrosa.base.adapter_io import load_run_or_model

    with progress_bar(console, f"loading {source}") as advance:
        return load_run_or_model(source, choose_device(device), advance)
