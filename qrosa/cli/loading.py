"""What the commands on finished models share: the device, a progress bar, and loading with both.

Torch-free at import, like every command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qrosa.base.shape_source import read_shape
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from qrosa.base.base_files import BaseFiles

_Function = TypeVar("_Function", bound=Callable[..., Any])
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
        yield _announce(console, what)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _announce(console: Console, what: str) -> Advance:
    """Says what is being done once something of it is, so that a fault at the start stands alone."""
    said = False

    def advance(done: int, total: int) -> None:
        nonlocal said
        if not said:
            said = True
            console.print(f"{what} ...", markup=False)

    return advance


@dataclass(frozen=True)
class Opened:
    """A run, an adapter or a bare model, found but not loaded: what is wrong with it shows before the long wait.

    Attributes:
        source: What the user named.
        base_files: The base.
        adapter: The adapter's folder; None for a bare model.
    """

    source: str
    base_files: BaseFiles
    adapter: Path | None

    def tokenizer(self, chat_template: str | None = None) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with the template in the file ``chat_template``, or else the one trained with.

        Raises:
            InputError: No usable tokenizer or template.
            StorageError: Damaged files.
        """
        from qrosa.base.speech import Speech
        from qrosa.data.rendering import read_template
        from qrosa.sparse.store import read_adapter_config

        tokenizer = self.base_files.tokenizer()
        if chat_template is not None:
            tokenizer.chat_template = read_template(chat_template)
        elif self.adapter is not None:
            Speech.of(read_adapter_config(self.adapter)).put_on(tokenizer)
        return tokenizer


def base_option(function: _Function) -> _Function:
    """``--model`` -> ``base_model``: where an adapter's base is now."""
    return click.option(
        "--model",
        "base_model",
        metavar="ID|FOLDER|FILE",
        help="Where a run's base is now, if it has moved since the training.",
    )(function)


def open_source(source: str, base_model: str | None = None) -> Opened:
    """Find a run, an adapter folder or a model, and its base.

    Raises:
        InputError: Nothing that can be loaded.
        StorageError: Damaged files.
    """
    from qrosa.base.adapter_io import adapter_folder, base_source, is_run_or_adapter
    from qrosa.base.open import open_base
    from qrosa.export.source import open_adapter_base

    if is_run_or_adapter(source):
        folder = adapter_folder(source)
        return Opened(source, open_adapter_base(folder, base_source(folder), base_model), folder)
    if base_model is not None:
        raise InputError(f"{source} is no run, so it has no base that --model could name", "leave out --model")
    return Opened(source, open_base(source), None)


def offload_option(function: _Function) -> _Function:
    """``--offload`` -> ``offload``: where the base lies while the model is used."""
    return click.option(
        "--offload",
        metavar="auto|none|base",
        default="auto",
        show_default=True,
        help="Keep the base in host memory and stream it: base, base=disk:FOLDER (mapped from files), none, or auto, "
        "as far as it does not fit the card.",
    )(function)


def load(opened: Opened, device: str | None, console: Console, offload: str = "auto") -> Any:
    """Load what was found, with a bar: the model in eval mode.

    Raises:
        InputError: The adapter is not of this base, or no such offload.
        StorageError: Damaged files.
    """
    import torch

    from qrosa.base.adapter_io import load_adapter
    from qrosa.base.load import load_base
    from qrosa.model.place import load_streamed

    place = choose_device(device)
    for note in opened.base_files.notes:
        console.print(note, markup=False)
    resident, disk = _streaming(opened, place, offload)
    if resident is not None and offload == "auto":
        console.print(f"the base does not fit the card: {resident} of its blocks stay, the others are streamed")
    with progress_bar(console, f"loading {opened.source}") as advance:
        if resident is None:
            model, _ = load_base(opened.base_files, place, progress=advance)
        else:
            model = load_streamed(opened.base_files, torch.device(place), resident, disk, advance)
    if opened.adapter is not None:
        load_adapter(model, opened.adapter)
    return model.eval()


def _streaming(opened: Opened, place: str, offload: str) -> tuple[int | None, str | None]:
    """Decoder blocks that stay on the device (None for all, unstreamed), and the folder to map the others from."""
    from qrosa.quantities import parse_offload

    asked = parse_offload(offload)
    if asked.activations or asked.optimizer:
        raise InputError(f"--offload {offload} is for training", "use auto, none, base or base=disk:FOLDER")
    if asked.base is False or (asked.base is None and not place.startswith("cuda")):
        return None, None
    import torch

    from qrosa.planner.bytes.inference import resident_blocks

    if not place.startswith("cuda"):
        return 0, asked.disk
    shape = read_shape(opened.base_files.source)
    adapter = sum(file.stat().st_size for file in opened.adapter.glob("*.safetensors")) if opened.adapter else 0
    free, _ = torch.cuda.mem_get_info(torch.device(place))
    resident = resident_blocks(shape, free, adapter)
    if resident is None and asked.base:
        resident = shape.dims.layers - 1
    return resident, asked.disk
