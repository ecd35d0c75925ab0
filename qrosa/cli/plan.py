"""``qrosa plan``: what a run will take, phase by phase, before anything is loaded.

Answers from the model's config.json and file headers alone, without torch. Only ``--data`` loads a tokenizer, to
measure the longest row, ``--simulate`` builds the model, without weights, and ``--probe`` loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.options import emit_json, given, json_option, model_option, progress_console, result_console
from qrosa.cli.options import settings_options as settings_flags
from qrosa.cli.plan_extras import (
    machine_options,
    probe_json,
    probe_option,
    probed_device,
    read_machines,
    run_probe,
    run_simulation,
    show_probe,
    show_reach,
    show_simulation,
    simulate_option,
    simulation_json,
)
from qrosa.config import DataConfig, TrainConfig, make_groups, read_yaml
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.planner.cards import Machines
    from qrosa.planner.plan import Plan
    from qrosa.planner.request import Rows

# Settings that change memory, or what the plan is made from; the rest of a config is read and passed over.
_SETTINGS = (
    *("budget", "rank", "density", "sparse_per_layer", "sparse_share", "dropout"),
    *("low_rank", "sparse_init", "low_rank_init", "rank_by"),
    *("mask_score", "mask_scope", "mask_memory"),
    *("data", "seq_len", "train_on", "columns", "chat_template"),
    *("batch_size", "micro_batch", "packing", "optimizer", "checkpointing", "offload", "deepspeed", "keep"),
    *("vram", "host_memory", "keep_best", "samples", "base_rounding", "objective", "sync_every"),
)
_EXAMPLES = """\b
Examples:
  qrosa plan --model meta-llama/Llama-3.1-8B --budget 0.3% --vram 24GB
  qrosa plan --model ./model --budget 20M --vram 12GB --seq-len 4096 --optimizer adamw8bit
  qrosa plan --model ./model --rank 16 --density 0.6% --data rows.jsonl --json
  qrosa plan --model ./model --budget 0.3% --gpu rtx4090 --gpus 2 --nodes 4 --network 10gbe
  qrosa plan --model ./model --budget 0.3% --gpu rtx4090 --nodes 2 --network 20mbit,80ms --sync-every 100
  qrosa plan --model ./model --budget 0.3% --data rows.jsonl --probe      # a few real steps on this machine
"""


@click.command(epilog=_EXAMPLES)
@model_option(required=False)
@click.option("--config", metavar="FILE", help="YAML file with any of these settings; flags win.")
@settings_flags("adapter", "masks", "data", "train", only=_SETTINGS)
@machine_options
@simulate_option
@probe_option
@json_option
def command(model: str | None, config: str | None, simulate: bool, probe: bool, as_json: bool, **settings: Any) -> None:
    """Say what a run will take, phase by phase, before anything is loaded.

    Prints the memory of loading, mask selection, training, evaluation, saving and export, component by component, and
    the micro-batch, checkpointing and chunk sizes that fit. With --vram for that card, without for the card that is
    here, or for this machine's memory if there is none. Exit code 3: it does not fit; the nearest settings that do are
    named. What-if rows tell how far the card reaches with and without each lever; with --gpu they come with estimated
    speeds, and with --gpus and --nodes with what the network of many cards costs.
    """
    machines = read_machines(settings)
    values = (read_yaml(config) if config else {}) | given(settings)
    source = model or values.get("model")
    if not source:
        raise InputError("--model is missing", "give --model, or model: in the config file")
    made = make_plan(str(source), values, machines, device=probed_device(machines) if probe else None)
    from qrosa.planner.search.alternatives import require_fit
    from qrosa.planner.show import document

    simulation = run_simulation(str(source), made) if simulate else None
    probed = run_probe(str(source), made) if probe and made.fits else None
    if as_json:
        added = (simulation_json(made, simulation) if simulation else {}) | (probe_json(probed) if probed else {})
        emit_json(document(made) | added)
    else:
        console = result_console()
        show(made, console)
        if simulation:
            show_simulation(made, simulation, console)
        if probed:
            show_probe(probed, console)
    require_fit(made)
    if probed:
        probed.require_fit()


def make_plan(source: str, values: dict[str, Any], machines: Machines | None = None, device: str | None = None) -> Plan:
    """Plan a model with flat settings, measuring the longest row if data is named.

    Raises:
        InputError: A model, a budget, rows or a setting that cannot be.
    """
    from qrosa.base.shape_source import read_shape
    from qrosa.data.length import row_length
    from qrosa.planner.hardware import read_here
    from qrosa.planner.request import UNKNOWN_ROWS, make_request
    from qrosa.planner.search.solve import solve

    groups, shape = make_groups(values), read_shape(source)
    rows = UNKNOWN_ROWS
    if groups.data.data:
        longest = row_length(groups.data.seq_len, shape.dims.max_positions)
        rows = measure_rows(source, groups.data, groups.train, longest)
    return solve(make_request(shape, groups, read_here(), rows=rows, device=device, machines=machines))


def measure_rows(source: str, data: DataConfig, train: TrainConfig, seq_len: int) -> Rows:
    """What a plan wants to know of the training rows, cut at ``seq_len``.

    Raises:
        InputError: No usable tokenizer or rows.
    """
    from qrosa.base.open import open_tokenizer
    from qrosa.data.dataset import load_rows
    from qrosa.data.rendering import read_template
    from qrosa.planner.request import known_rows

    tokenizer = open_tokenizer(source)
    if data.chat_template is not None:
        tokenizer.chat_template = read_template(data.chat_template)
    with progress_console().status("measuring the rows"):
        rows = load_rows(
            data.data,
            tokenizer,
            seq_len=seq_len,
            train_on=data.train_on,
            columns=data.columns,
            answers=train.goal.answers,
        )
    return known_rows(rows.lengths, train, longest=rows.report.longest, tokens=rows.report.tokens)


def show(made: Plan, console: Console) -> None:
    """Print a plan for people: table, where the budget went, the settings with their reasons, the verdict."""
    from qrosa.planner.reasons import reasons
    from qrosa.planner.show import memory_table, verdict

    console.print(memory_table(made))
    why = reasons(made)
    for line in (*made.where, *made.request.shape.all_notes):
        console.print(line, markup=False)
    console.print()
    for name, value in made.settings.items():
        if value is None:
            continue
        reason = why.get(name)
        shown = (
            ("on" if value else "off") if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else value
        )
        console.print(f"{name.replace('_', '-'):20} {shown!s:>14}" + (f"   {reason}" if reason else ""))
    console.print()
    show_reach(made, console)
    console.print(verdict(made), style="green" if made.fits else "red")
