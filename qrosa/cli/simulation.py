"""``qrosa plan --simulate``: simulated peaks beside the planned ones, and the tensors that make the highest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.options import progress_console

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.measure.simulate import Simulation
    from qrosa.planner.plan import Plan

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

    from qrosa.quantities import size_text

    table = Table(title="Tensors, planned and simulated, in MB", title_justify="left")
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
        largest.add_row(size_text(kind.size), f"{kind.count} of {shape}", kind.dtype, what, kind.module)
    console.print(table)
    console.print(largest)
