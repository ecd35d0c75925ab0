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
from qrosa.quantities import parse_share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

_EXAMPLES = """\b
Examples:
  qrosa quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --output base
  qrosa quantize --model ./model --output base --density 0.3% --calibration rows.jsonl
  qrosa quantize --model ./model --output base --density 0.3% --rank 8 --json
  qrosa eval base --data test.jsonl            # with the repair; base/ alone loads in transformers too
"""
_WHOLE_ROWS = 1 << 20  # tokens: no row is cut
_LINES = {"original": "16 bits", "nearest": "4 bits, to nearest", "base": "4 bits, here", "repaired": "with the repair"}


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
@force_option
@device_option
@json_option
def command(
    model: str,
    output: str,
    density: str,
    calibration: str | None,
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
    run. The report compares perplexity on held-out windows with 16 bits and with rounding to nearest.

    Interrupted, the same command goes on after the last whole block.
    """
    from qrosa.calibrate.quantize import quantize
    from qrosa.calibrate.settings import QuantizeConfig

    console = progress_console()
    place = choose_device(device)
    share = parse_share(density, "--density")
    config = QuantizeConfig(model, output, density=share, rank=rank, rows=rows, length=seq_len, seed=seed)
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


def _token_rows(model: str, calibration: str) -> list[list[int]]:
    """The tokens of the rows to calibrate on, every row whole."""
    from qrosa.base.open import open_base
    from qrosa.data.dataset import load_rows

    found = load_rows(calibration, open_base(model).tokenizer(), seq_len=_WHOLE_ROWS, train_on="all")
    return [row.input_ids for row in found.rows]


def _show(console: Console, output: str, report: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("", "perplexity", "won back"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, outcome in report["perplexity"].items():
        share = outcome["won_back"]
        table.add_row(_LINES[name], f"{outcome['perplexity']:.3f}", "-" if share is None else f"{100 * share:.0f}%")
    console.print(table)
    held_out, calibration = (f"{report[part]['tokens']:,}" for part in ("held_out", "calibration"))
    took = f"{report['seconds']:.0f} s"
    console.print(f"on {held_out} held-out tokens; calibrated on {calibration}; {took}", markup=False)
    console.print(f"4-bit model: {output}  (errors by matrix: {output}/report.json)", markup=False)
