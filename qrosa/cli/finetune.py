"""``qrosa finetune``: from a model, rows and a budget to a run folder.

Every setting is a flag and a key of ``--config``; flags win. A flag also takes the place of the settings that it
contradicts (``--max-steps`` that of ``epochs``), so a recipe's budget or length can be changed from outside.
With ``--resume`` the run's own ``config.yaml`` lies below both: ``--resume --output RUN`` is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.failures import printable
from qrosa.cli.options import (
    emit_json,
    force_option,
    given,
    json_option,
    model_option,
    progress_console,
    result_console,
    settings_options,
)
from qrosa.config import RunConfig, make_run_config, read_yaml
from qrosa.errors import InputError, StorageError
from qrosa.planner.hardware import machine_here

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.train.prepare import Prepared

# A setting given on top of others takes the place of these.
_REPLACES: dict[str, tuple[str, ...]] = {
    "max_steps": ("epochs",),
    "epochs": ("max_steps",),
    "budget": ("rank", "density", "sparse_per_layer"),
    "rank": ("budget", "rank_by"),
    "density": ("budget", "rank_by", "sparse_per_layer"),
    "sparse_per_layer": ("budget", "rank_by", "density"),
    "eval_data": ("eval_split",),
    "eval_split": ("eval_data",),
}

_START_OVER = "give all its settings again with --force, or in another --output"
EPILOG = """\b
Examples:
  qrosa finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --budget 0.3% --output run
  qrosa finetune --config recipe.yaml --seed 1 --output run-1
  qrosa finetune --model M --data rows.jsonl --budget 0.3% --dry-run       # the plan and three rows, nothing else
  qrosa finetune --resume --output run                                     # goes on, bit for bit
  torchrun --nproc-per-node 2 --no-python qrosa finetune --config recipe.yaml --deepspeed zero2      # two cards
  qrosa finetune --config recipe.yaml --offload auto,optimizer             # masters and AdamW in host memory
  torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr HOST --no-python \\
      qrosa finetune --config recipe.yaml --sync-every 100                 # machines that a slow network joins
"""


@click.command(epilog=EPILOG)
@model_option(required=False)
@click.option("--output", metavar="FOLDER", help="The run folder to make.")
@click.option("--config", "config_file", metavar="FILE", help="YAML file with any of these settings; flags win.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output from its newest checkpoint.")
@force_option
@click.option("--dry-run", is_flag=True, help="Show the plan and three rows with their learnt part; do nothing.")
@settings_options("adapter", "masks", "data", "train")
@json_option
def command(
    config_file: str | None, resume: bool, force: bool, dry_run: bool, as_json: bool, **settings: str | None
) -> None:
    """Fine-tune a model: a frozen 4-bit base with low-rank and sparse adapters.

    Loss falls on completions only. The run folder holds the resolved settings, the plan, metrics, checkpoints, the
    adapter and a report; 'qrosa export' makes a plain model of it.
    """
    config = resolve(config_file, settings, resume=resume, dry_run=dry_run)
    if dry_run:
        _dry_run(config, as_json=as_json)
        return
    from qrosa.cli.live import make_progress
    from qrosa.train.run import finetune

    console = progress_console()
    report = finetune(config, resume=resume, force=force, callbacks=[make_progress(console)])
    if not report:  # not the main process: that one speaks for all
        return
    if as_json:
        emit_json(report)
    else:
        _say_done(console, config, report)


def resolve(config_file: str | None, settings: Mapping[str, str | None], *, resume: bool, dry_run: bool) -> RunConfig:
    """Put flags over the config file over the run to resume.

    Raises:
        InputError: Unknown, malformed, missing or contradicting settings.
        StorageError: A config file cannot be read.
    """
    flags = given(settings)
    below = read_yaml(config_file) if config_file else {}
    values = overlay(below, flags)
    if resume and values.get("output"):
        apart = str(values.get("sync_every", 1)) != "1"
        values = overlay(_stored(Path(str(values["output"])), apart=apart), values)
    if dry_run:
        values.setdefault("output", "run")
    return make_run_config(values)


def _stored(run: Path, *, apart: bool) -> dict[str, Any]:
    """The settings of the run to resume.

    Args:
        run: Its folder.
        apart: Machines step on their own: all but the first may be new to the run, and then go by what they are given.

    Raises:
        InputError: There is no run.
        StorageError: Its settings are damaged.
    """
    path = run / "config.yaml"
    if machine_here():
        from qrosa.record.folder import machine_folder

        own = machine_folder(run, machine_here()) / "config.yaml"
        if own.is_file():
            path = own
        elif apart and not path.is_file():
            return {}
    if not path.is_file():
        raise InputError(f"there is no run to resume in {run}", "check --output, or leave --resume out")
    try:
        stored = read_yaml(path)
    except InputError as error:
        raise StorageError(f"the settings of run {run} are damaged: {error.message}", _START_OVER) from None
    if not stored.keys() >= {"model", "data"}:
        raise StorageError(f"the settings of run {run} are incomplete", _START_OVER)
    return stored


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, where a setting of ``above`` also removes what it contradicts."""
    replaced = {name for key in above if above[key] is not None for name in _REPLACES.get(key, ())}
    kept = {key: value for key, value in below.items() if key not in replaced and value is not None}
    return {**kept, **{key: value for key, value in above.items() if value is not None}}


def _dry_run(config: RunConfig, *, as_json: bool) -> None:
    from qrosa.planner.search.alternatives import require_fit
    from qrosa.planner.show import document
    from qrosa.train.prepare import prepare

    prepared = prepare(config, dry_run=True)
    for text in prepared.told():
        progress_console().print(text, markup=False, soft_wrap=True)
    if as_json:
        emit_json({**document(prepared.plan), "data": prepared.data_report()})
    else:
        console = result_console()
        _show_setup(console, prepared)
        _show_rows(console, prepared)
    require_fit(prepared.plan)


def _show_setup(console: Console, prepared: Prepared) -> None:
    """The plan, the data and the steps, in words."""
    from qrosa.cli.plan import show

    show(prepared.plan, console)
    report, phases = prepared.train.report, prepared.phases
    held_out = f", {len(prepared.heldout)} held out" if prepared.heldout else ""
    console.print(
        f"{report.rows} rows ({report.kind}){held_out}; {report.tokens:,} tokens, {report.supervised_tokens:,} of them "
        f"learnt; longest {report.longest}; {report.truncated} cut to --seq-len; {report.dropped} dropped",
        markup=False,
    )
    what = "pairs" if prepared.train.answers == "pairs" else "rows"
    warmup = f", the first {phases.warmup} before the masks are picked" if phases.sparse and phases.warmup else ""
    console.print(f"{phases.total} steps of {prepared.config.train.batch_size} {what}{warmup}", markup=False)


# What a row is to its neighbours, by how answers stand in the data; the last where it is not wanted.
_WORDS = {"single": ("",), "pairs": (": chosen", ": rejected"), "judged": (": wanted", ": wanted", ": not wanted")}


def _show_rows(console: Console, prepared: Prepared) -> None:
    """Three rows as the model reads them, the learnt part in colour (and in brackets where there is none)."""
    from rich.text import Text

    from qrosa.data.preview import preview

    console.print("\nThree rows; what is learnt is marked:", markup=False)
    rows, words = prepared.train.rows, _WORDS[prepared.train.answers]
    for place, (row, pieces) in enumerate(zip(rows, preview(rows, prepared.tokenizer), strict=False)):
        which = words[place % len(words) if row.wanted else -1]
        text = Text(f"--- {printable(row.where)}{which}\n", style="dim")
        for piece, learnt in pieces:
            plain = printable(f"[[{piece}]]" if learnt and not console.is_terminal else piece)
            text.append(plain, style="bold black on green" if learnt else "default")
        console.print(text)


def _say_done(console: Console, config: RunConfig, report: Mapping[str, Any]) -> None:
    from qrosa.report.words import beside_loss, ending

    loss, evaluation = report["loss"], report["eval"]
    console.print(f"loss {loss['first']:.4f} -> {loss['last']:.4f} in {report['steps']} steps", markup=False)
    if evaluation:
        text = f"held-out loss {evaluation['loss']:.4f}, {beside_loss(evaluation)}"
        console.print(f"{text} on {evaluation['rows']} rows", markup=False)
    for told in ending(report):
        console.print(told, markup=False, soft_wrap=True)
    objective = f" --objective {config.train.objective}" if config.train.goal.compares else ""
    console.print(f"run: {config.output}  (curves: {config.output}/report.html)", markup=False)
    console.print(
        f"next: qrosa eval {config.output} --data F{objective}, or qrosa export {config.output} --output DIR",
        markup=False,
    )
