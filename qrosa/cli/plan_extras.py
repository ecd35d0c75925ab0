"""What ``qrosa plan`` can add to a plan: cards that are not here, a simulated step, a real one.

``--gpu``, ``--gpus``, ``--nodes`` and ``--network`` estimate the time of a step; ``--simulate`` runs the real step on
tensors without data; ``--probe`` runs real steps on the device that is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.options import progress_console
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.measure.probe import Probe
    from qrosa.measure.simulate import Simulation
    from qrosa.planner.cards import Machines
    from qrosa.planner.plan import Plan

DEFAULT_NETWORK = "10gbe"


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the four options; :func:`read_machines` takes them out of its settings again."""
    for option in (
        click.option(
            "--network",
            metavar="1gbe|10gbe|100gbe|RATE,MS",
            help=f"What joins the machines; 20mbit,80ms is a rate and a round trip.  [default: {DEFAULT_NETWORK}]",
        ),
        click.option("--nodes", type=click.IntRange(1, 100_000), metavar="N", help="Machines.  [default: 1]"),
        click.option("--gpus", type=click.IntRange(1, 64), metavar="N", help="Cards in a machine.  [default: 1]"),
        click.option(
            "--gpu",
            metavar="NAME",
            help="Estimate the time of a step on this card, such as rtx4090. Without --vram, plan for its memory.",
        ),
    ):
        function = option(function)
    return function


def read_machines(settings: dict[str, Any]) -> Machines | None:
    """Take the four options out of a command's settings: what to estimate on, if a card is named.

    Raises:
        InputError: A card or a network that is not in the tables, or one without what it belongs to.
    """
    gpu, gpus, nodes, network = (settings.pop(name) for name in ("gpu", "gpus", "nodes", "network"))
    if gpu is None:
        asked = {"gpus": gpus, "nodes": nodes, "network": network}
        extra = next((name for name, value in asked.items() if value is not None), None)
        if extra is not None:
            raise InputError(f"--{extra} is for the estimate, which needs a card", "add --gpu, such as --gpu rtx4090")
        return None
    from qrosa.planner.cards import Machines, find_card, find_network

    card, nodes = find_card(gpu), nodes or 1
    if network is not None and nodes == 1:
        raise InputError("--network joins machines, and there is one", "add --nodes, such as --nodes 4")
    return Machines(card, gpus or 1, nodes, find_network(network or DEFAULT_NETWORK) if nodes > 1 else None)


def show_reach(made: Plan, console: Console) -> None:
    """Print the estimated step, what crosses PCIe in it, and the what-if rows."""
    from qrosa.planner.search.whatif import what_if
    from qrosa.planner.show import what_if_table
    from qrosa.planner.time.estimate import traffic_words
    from qrosa.planner.time.run_time import run_time

    estimated = made.estimate()
    run = run_time(made)
    lines = estimated.describe() if estimated else traffic_words(made.traffic)
    for line in [*lines, *([run.describe()] if run else [])]:
        console.print(line)
    console.print(what_if_table(made, what_if(made)))


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

    table = Table(title="Memory, planned and measured, in MiB", title_justify="left")
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


simulate_option = click.option(
    "--simulate", is_flag=True, help="Also run the real step on tensors without data, and compare; takes seconds."
)


def run_simulation(source: str, made: Plan) -> Simulation:
    """Run the planned phases on tensors without data."""
    from qrosa.measure.simulate import simulate

    with progress_console().status("simulating a step"):
        return simulate(source, made.work)


def simulation_json(made: Plan, simulation: Simulation) -> dict[str, Any]:
    """What ``--simulate`` adds to the document: bytes of tensors, without what the driver and the allocator take."""
    return {
        "simulated": {name: peak.total for name, peak in simulation.phases.items()},
        "planned_tensors": {name: made.phases[name].tensor_total for name in simulation.phases},
        "peak_phase": simulation.highest,
        "peak_moment": simulation.phases[simulation.highest].moment,
        "peak_tensors": [tensors.to_json() for tensors in simulation.largest(simulation.highest)],
    }


def show_simulation(made: Plan, simulation: Simulation, console: Console) -> None:
    """Print two tables: planned and simulated by phase, and the largest tensors of the highest phase."""
    from rich.table import Table

    from qrosa.quantities import bytes_text

    table = Table(title="Tensors, planned and simulated, in MiB", title_justify="left")
    for column in ("phase", "planned", "simulated", "difference", "highest at"):
        table.add_column(column, justify="left" if column in ("phase", "highest at") else "right")
    for name, peak in simulation.phases.items():
        planned = made.phases[name].tensor_total
        apart = f"{100 * (planned / peak.total - 1):+.2f}%"
        table.add_row(name, f"{planned / 2**20:,.1f}", f"{peak.total / 2**20:,.1f}", apart, peak.moment)
    largest = Table(title=f"Largest tensors at the peak of {simulation.highest}", title_justify="left")
    for column in ("size", "tensors", "dtype", "for", "made by"):
        largest.add_column(column, justify="right" if column == "size" else "left")
    for kind in simulation.largest(simulation.highest):
        shape = " x ".join(str(size) for size in kind.shape) or "scalar"
        what = kind.component.replace("_", " ")
        largest.add_row(bytes_text(kind.size), f"{kind.count} of {shape}", kind.dtype, what, kind.module)
    console.print(table)
    console.print(largest)
