"""``--gpu``, ``--gpus``, ``--nodes`` and ``--network`` of ``qrosa plan``: what a step would take on cards not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.planner.cards import Machines
    from qrosa.planner.plan import Plan

DEFAULT_NETWORK = "10gbe"


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the four options; :func:`read_machines` takes them out of its settings again."""
    for option in (
        click.option(
            "--network", metavar="1gbe|10gbe|100gbe", help=f"What joins the machines.  [default: {DEFAULT_NETWORK}]"
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
    from qrosa.planner.show import what_if_table
    from qrosa.planner.time.estimate import traffic_words

    estimated = made.estimate()
    for line in estimated.describe() if estimated else traffic_words(made.traffic):
        console.print(line)
    console.print(what_if_table(made, made.what_if()))
