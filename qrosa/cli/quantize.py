"""``qrosa quantize``: a better 4-bit base, and its repair beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.live import make_progress
from qrosa.cli.loading import choose_device
from qrosa.cli.options import (
    device_option,
    emit_json,
    force_option,
    json_option,
    model_option,
    progress_console,
    result_console,
)
from qrosa.errors import InputError
from qrosa.quantities import bytes_text, parse_share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from qrosa.calibrate.settings import QuantizeConfig

_EXAMPLES = """\b
Examples:
  qrosa quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --output base
  qrosa quantize --model ./model --output base --density 0.3% --calibration rows.jsonl
  qrosa quantize --model ./model --output base --density 0.3% --rank 8 --json
  qrosa quantize --model ./8b --output base --dry-run --gpu rtx4090   # what it takes there
  qrosa eval base --data test.jsonl            # with the repair
"""
_WHOLE_ROWS = 1 << 20  # tokens: no row is cut


@click.command(epilog=_EXAMPLES)
@model_option()
@click.option("--output", required=True, metavar="FOLDER", help="The folder to make.")
@click.option("--density", default="0%", show_default=True, metavar="SHARE", help="Sparse values, as 0.3%.")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(0, 4096), help="Rank of the low-rank part.")
@click.option(
    "--calibration",
    metavar="FILE|FOLDER|ID",
    help="Rows to calibrate on, in the formats of finetune's --data.  [default: the model writes its own]",
)
@click.option("--rows", default=128, show_default=True, type=click.IntRange(min=1), help="Calibration windows.")
@click.option("--seq-len", default=256, show_default=True, type=click.IntRange(min=8), help="Tokens a window.")
@click.option("--seed", default=42, show_default=True, type=click.IntRange(min=0), help="Of the windows drawn.")
@click.option("--dry-run", is_flag=True, help="Say what it will take and stop.")
@click.option("--gpu", metavar="NAME", help="With --dry-run: on this card, such as rtx4090.  [default: on --device]")
@force_option
@device_option
@json_option
def command(
    model: str,
    output: str,
    density: str,
    calibration: str | None,
    dry_run: bool,
    gpu: str | None,
    force: bool,
    device: str | None,
    as_json: bool,
    rank: int,
    rows: int,
    seq_len: int,
    seed: int,
) -> None:
    """Quantise a model to 4 bits with error feedback: nearer to 16 bits in the same bytes.

    Writes a checkpoint that transformers and bitsandbytes load as any other in 4 bits. With --density or --rank an
    adapter lies beside it that takes back more of what 4 bits lost; eval, generate and export take the folder like a
    run. Such a base is only good with its adapter: the sparse part holds its largest weights, which 4 bits then no
    longer do. For one that is to be loaded alone, leave both out.

    The report compares perplexity on held-out windows with 16 bits and with rounding to nearest.

    Interrupted, the same command goes on after the last whole block.
    """
    from qrosa.calibrate.settings import QuantizeConfig

    share = parse_share(density, "--density")
    config = QuantizeConfig(model, output, density=share, rank=rank, rows=rows, length=seq_len, seed=seed)
    if dry_run:
        _say_plan(config, gpu, device, as_json=as_json)
        return
    if gpu is not None:
        raise InputError("--gpu only estimates", "add --dry-run, or leave --gpu out")
    from qrosa.calibrate.quantize import quantize

    console = progress_console()
    place = choose_device(device)
    given = _token_rows(model, calibration) if calibration else None
    progress = make_progress(console)
    try:
        report = quantize(config, given, device=place, force=force, stage=progress.on_phase)
    finally:
        progress.on_end()
    if as_json:
        emit_json(report)
    else:
        _show(result_console(), output, report)


def _say_plan(config: QuantizeConfig, gpu: str | None, device: str | None, *, as_json: bool) -> None:
    """Print what a quantisation takes on the card that is named, or on the device that it would run on."""
    from rich.table import Table

    from qrosa.calibrate.planned import plan
    from qrosa.planner.cards import find_card

    card = find_card(gpu) if gpu is not None else None
    place = card.name if card else choose_device(device)
    planned = plan(config, on_card=place != "cpu")
    seconds = planned.seconds_on(card) if card else planned.seconds_here() if place == "cpu" else None
    if as_json:
        emit_json({"device": place, **planned.to_json(seconds)})
        return
    console = result_console()
    console.print(f"memory of the pass over the blocks, on {place}:", markup=False)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for component, size in planned.bytes.items():
        table.add_row(component, bytes_text(size), style="bold" if component == "total" else None)
    console.print(table)
    took = "" if seconds is None else f", some {seconds:,.0f} s"
    console.print(f"before it, to weigh tokens: {bytes_text(planned.weighing)}", markup=False)
    console.print(f"{planned.cost.operations:.2e} operations, {planned.cost.columns:,} columns in turn{took}")
    if card:
        word = "fits" if planned.peak <= card.memory else "does not fit"
        console.print(f"{word}: {bytes_text(planned.peak)} of {bytes_text(card.memory)}")
    console.print("not in the time: reading the model, rows that it writes, sparse positions, the losses")


def _token_rows(model: str, calibration: str) -> list[list[int]]:
    """The tokens of the rows to calibrate on, every row whole."""
    from qrosa.base.open import open_base
    from qrosa.data.dataset import load_rows

    found = load_rows(calibration, open_base(model).tokenizer(), seq_len=_WHOLE_ROWS, train_on="all")
    return [row.input_ids for row in found.rows]


def _show(console: Console, output: str, report: Mapping[str, Any]) -> None:
    from rich.table import Table

    from qrosa.calibrate.page import FORMS

    table = Table(box=None)
    for heading in ("", "perplexity", "won back"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, outcome in report["perplexity"].items():
        share = outcome["won_back"]
        table.add_row(FORMS[name], f"{outcome['perplexity']:.3f}", "-" if share is None else f"{100 * share:.0f}%")
    console.print(table)
    held_out, calibration = (f"{report[part]['tokens']:,}" for part in ("held_out", "calibration"))
    took = f"{report['seconds']:.0f} s"
    console.print(f"on {held_out} held-out tokens; calibrated on {calibration}; {took}", markup=False)
    if "repaired" in report["perplexity"]:
        console.print("the base is made for its repair: use them together, or quantise without --density and --rank")
    console.print(f"4-bit model: {output}  (errors by matrix: {output}/report.html)", markup=False)
