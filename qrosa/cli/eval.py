"""``qrosa eval``: a model or a run, scored on rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.loading import base_option, choose_device, load, offload_option, open_source, progress_bar
from qrosa.cli.options import (
    device_option,
    emit_json,
    json_option,
    progress_console,
    result_console,
    settings_options,
)
from qrosa.config import DataConfig, make_group
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.data.dataset import DataReport

_EXAMPLES = """\b
Examples:
  qrosa eval run --data test.jsonl
  qrosa eval HuggingFaceTB/SmolLM2-135M-Instruct --data test.jsonl --limit 500 --json
  qrosa eval run/checkpoints/step-200 --data folder --split validation
"""
_PERCENT = ("accuracy", "exact_match")


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="RUN-OR-MODEL")
@settings_options("data", required=("data",), only=("data", "seq_len", "train_on"))
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Which rows of a folder or data set that names splits.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score the first N rows only.")
@base_option
@device_option
@offload_option
@json_option
def command(
    source: str,
    split: str,
    limit: int | None,
    base_model: str | None,
    device: str | None,
    offload: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score a model or a run on rows: loss, perplexity, accuracy.

    Loss is the mean over completion tokens. Where the rows' completions are few and short (at most 64 different ones of
    32 tokens), they are taken as labels: accuracy is how often the row's own is the likeliest of them, exact match how
    often the model writes it by itself.
    """
    from qrosa.data.dataset import load_rows
    from qrosa.data.length import row_length
    from qrosa.eval.tasks import evaluate_tasks

    data = make_group(DataConfig, settings)
    if data.data is None:
        raise InputError("--data is missing", "give the rows to score on")
    console = progress_console()
    place = choose_device(device)
    opened = open_source(source, base_model)
    seq_len = row_length(data.seq_len, getattr(opened.base_files.config, "max_position_embeddings", None))
    found = load_rows(
        data.data, opened.base_files.tokenizer(), seq_len=seq_len, train_on=data.train_on, limit=limit, split=split
    )
    _say_losses(console, found.report, seq_len)
    model, tokenizer = load(opened, place, console, offload)
    with progress_bar(console, f"scoring {len(found)} rows") as advance:
        result = evaluate_tasks(model, tokenizer, found.rows, progress=advance)
    if as_json:
        emit_json({"model": source, "data": data.data, **result})
    else:
        _show(result_console(), result)


def _say_losses(console: Console, report: DataReport, seq_len: int) -> None:
    """Rows that do not count as they stand in the file."""
    if report.dropped:
        console.print(f"note: {report.dropped} rows have no token to score and are left out", markup=False)
    if report.truncated:
        console.print(f"note: {report.truncated} rows were cut to {seq_len} tokens", markup=False)


def _show(console: Console, result: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for key, value in result.items():
        if value is None:
            continue
        shown = f"{100 * value:.1f}%" if key in _PERCENT else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(key.replace("_", " "), shown)
    console.print(table)
