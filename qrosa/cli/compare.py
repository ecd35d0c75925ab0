"""``qrosa compare``: two runs or more side by side, as a table, a JSON document, or a page with their curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from qrosa.cli.failures import printable
from qrosa.cli.options import emit_json, force_option, json_option, progress_console, result_console
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.report.compare import Comparison

_EXAMPLES = """\b
Examples:
  qrosa compare run-1 run-2
  qrosa compare runs/* --output compare.html       # the same table, and all curves in one chart each
  qrosa compare run-1 run-2 --json
"""


def _folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def _files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


@click.command(epilog=_EXAMPLES)
@click.argument("runs", metavar="RUN RUN [...]", nargs=-1, shell_complete=_folders)
@click.option("--output", metavar="FILE", shell_complete=_files, help="Write a page with the runs' curves here.")
@force_option
@json_option
def command(runs: tuple[str, ...], output: str | None, force: bool, as_json: bool) -> None:
    """Compare runs: the settings that differ, losses, time and memory.

    Runs that are still going on are compared as far as they are. Where the base or the rows of the runs differ, that is
    said: their losses are not of the same thing then.
    """
    from qrosa.report.compare import Comparison

    comparison = Comparison([Path(run) for run in runs])
    if output is not None:
        _write_page(comparison, Path(output), force=force)
    if as_json:
        emit_json(comparison.document())
    else:
        _show(result_console(), comparison)
    if output is not None:
        progress_console().print(printable(f"page: {output}"), markup=False, soft_wrap=True)


def _write_page(comparison: Comparison, output: Path, *, force: bool) -> None:
    """Write the page; what lies there must be such a page, or ``force`` given.

    Raises:
        InputError: Something else lies there.
        StorageError: It cannot be written.
    """
    from qrosa.files import write_text
    from qrosa.report.compare_page import MARK, page

    if output.exists() and not output.is_file():
        raise InputError(f"output {output} is not a file", "give a file as --output, such as compare.html")
    if output.exists() and not force and MARK.encode() not in _beginning(output):
        raise InputError(
            f"output {output} exists and is not a page of 'qrosa compare'", "give another --output, or add --force"
        )
    write_text(output, page(comparison))


def _beginning(path: Path) -> bytes:
    """Enough of a file to know such a page by."""
    with open(path, "rb") as file:
        return file.read(1 << 16)


def _show(console: Console, comparison: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", box=None, header_style="bold")
    for name in comparison.names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for what, *texts in comparison.rows():
        table.add_row(what, *(Text(printable(text)) for text in texts))
    settings = comparison.setting_rows()
    table.add_section()
    for what, *texts in settings:
        table.add_row(what, *(Text(printable(text)) for text in texts))
    console.print(table)
    if not settings:
        console.print("no setting differs", markup=False)
    for note in comparison.notes:
        console.print(printable(f"note: {note}"), markup=False, soft_wrap=True)
