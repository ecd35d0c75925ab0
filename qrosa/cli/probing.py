"""``qrosa plan --probe``: real steps on the device that is here, beside what was planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.options import progress_console
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.measure.probe import Probe
    from qrosa.planner.plan import Plan

probe_option = click.option(
    "--probe",
    is_flag=True,
    help="Also load the base and run real steps at the longest micro-batch on this machine; writes nothing.",
)


def probed_device(machines: object) -> str:
    """The device that a probe runs on, which is also the one to plan for.

    Raises:
        InputError: A card was named to estimate on, which need not be the one that is here.
    """
    if machines is not None:
        raise InputError("--probe runs on this machine, and --gpu names a card", "leave out one of the two")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_probe(source: str, made: Plan) -> Probe:
    """Run the planned settings for a few steps."""
    from qrosa.measure.probe import probe

    with progress_console().status("probing") as status:

        def stage(name: str, done: int, total: int) -> None:
            status.update(f"probing: {name}" + (f" {done} of {total}" if total > 1 else ""))

        return probe(source, made, stage=stage)


def probe_json(found: Probe) -> dict[str, Any]:
    """What ``--probe`` adds to the document."""
    return {"probe": found.to_json()}


def show_probe(found: Probe, console: Console) -> None:
    """Print planned and measured by phase, and the time of a step."""
    from rich.table import Table

    table = Table(title="Memory, planned and measured, in MB", title_justify="left")
    columns = ["phase", "planned", "measured", "difference", *(["reserved"] if found.reserved else [])]
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, measured in found.measured.items():
        planned = found.planned[name]
        cells = [name, f"{planned / 2**20:,.1f}", f"{measured / 2**20:,.1f}", f"{100 * (planned / measured - 1):+.2f}%"]
        table.add_row(*cells, *([f"{found.reserved[name] / 2**20:,.1f}"] if found.reserved else []))
    console.print(table)
    if found.step_seconds is not None and found.micro_batch_seconds is not None:
        console.print(
            f"measured: {found.step_seconds:.2f} s a step of longest rows, {found.tokens_per_s:,.0f} tokens/s "
            f"({found.micro_batch_seconds:.2f} s a micro-batch)"
        )
