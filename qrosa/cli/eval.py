"""``qrosa eval``: a model or a run, scored on rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.loading import Opened, base_option, choose_device, load, offload_option, open_source, progress_bar
from qrosa.cli.options import (
    device_option,
    emit_json,
    json_option,
    progress_console,
    result_console,
    settings_options,
)
from qrosa.config import DataConfig, TrainConfig, make_group
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = """\b
Examples:
  qrosa eval run --data test.jsonl
  qrosa eval HuggingFaceTB/SmolLM2-135M-Instruct --data test.jsonl --limit 500 --json
  qrosa eval run/checkpoints/step-200 --data folder --split validation
  qrosa eval run --objective dpo --data pairs.jsonl
  qrosa eval run --tasks hellaswag,arc_easy
"""
_PERCENT = ("accuracy", "exact_match")
_SETTINGS = (
    *("data", "seq_len", "train_on", "columns", "chat_template"),
    *("objective", "beta", "desirable_weight", "undesirable_weight"),
)


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="RUN-OR-MODEL")
@settings_options("data", "train", only=_SETTINGS)
@click.option("--tasks", metavar="NAME,...", help="Score on tasks of lm_eval instead of rows.")
@click.option(
    "--task-files",
    metavar="FOLDER",
    help="More tasks for lm_eval, as YAML files; code that they name runs.",
)
@click.option("--as-chat", is_flag=True, help="Put the tasks' prompts through the chat template.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Which rows of a folder or data set that names splits.  [default: test, else validation]",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score the first N rows only.")
@base_option
@device_option
@offload_option
@json_option
def command(
    source: str,
    tasks: str | None,
    task_files: str | None,
    as_chat: bool,
    split: str | None,
    limit: int | None,
    base_model: str | None,
    device: str | None,
    offload: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score a model or a run on rows: loss, perplexity, accuracy. Or on tasks of lm_eval.

    Loss is the mean over completion tokens. Where the rows' completions are few and short (at most 64 different ones of
    32 tokens), they are taken as labels: accuracy is how often the row's own is the likeliest of them, exact match how
    often the model writes it by itself.

    With --objective dpo, rows of prompt, chosen and rejected: accuracy is how often the adapter made the chosen answer
    more likely than the rejected one, against the base without it; the margin says by how much. With orpo the same
    without the base, by the log odds ratio, of models too; with kto, rows of prompt, completion and label: how often a
    wanted answer gained more than answers to other prompts did, and an unwanted one less.

    With --tasks, the tasks' own metrics, as lm_eval has them, of the 4-bit base with the adapter.
    """
    from qrosa.data.dataset import EVAL_SPLITS, load_rows
    from qrosa.data.length import row_length

    data, train = make_group(DataConfig, settings), make_group(TrainConfig, settings)
    _check_asked(data.data, tasks, task_files, as_chat)
    if tasks is not None:
        opened = open_source(source, base_model)
        document = _on_tasks(opened, tasks, task_files, device, offload, data, limit, as_chat=as_chat)
        emit_json({"model": source, "tasks": document}) if as_json else _show_tasks(result_console(), document)
        return
    goal = train.goal
    console = progress_console()
    place = choose_device(device)
    opened = open_source(source, base_model)
    if goal.reference and opened.adapter is None:
        raise InputError(
            f"{source} has no adapter, and --objective {goal.name} measures against the base without it",
            "give a run or an adapter folder; pairs of a model alone are measured with --objective orpo",
        )
    seq_len = row_length(data.seq_len, getattr(opened.base_files.config, "max_position_embeddings", None))
    found = load_rows(
        data.data,
        opened.tokenizer(data.chat_template),
        seq_len=seq_len,
        train_on=data.train_on,
        limit=limit,
        split=split or EVAL_SPLITS,
        columns=data.columns,
        vocabulary=getattr(opened.base_files.config, "vocab_size", None),
        answers=goal.answers,
    )
    if told := found.report.told("rows"):
        console.print(f"note: {told}", markup=False, soft_wrap=True)
    model = load(opened, place, console, offload)
    tokenizer = opened.tokenizer(data.chat_template)
    with progress_bar(console, f"scoring {found.examples} {'pairs' if found.group == 2 else 'rows'}") as advance:
        result = _scored(model, tokenizer, found.rows, train, advance)
    if as_json:
        rows = data.data[0] if len(data.data) == 1 else data.data
        emit_json({"model": source, "data": rows, "unused": found.report.unused, **result})
    else:
        _show(result_console(), result)


def _check_asked(data: Any, tasks: str | None, task_files: str | None, as_chat: bool) -> None:
    """Refuse what leaves open, or contradicts, what to score on."""
    if data and tasks is not None:
        raise InputError("--data and --tasks contradict each other", "give one of them")
    if tasks is None and (task_files is not None or as_chat):
        flag = "--task-files" if task_files is not None else "--as-chat"
        raise InputError(f"{flag} is of --tasks, which is missing", "name the tasks, or leave it out")
    if not data and tasks is None:
        raise InputError("--data is missing", "give the rows to score on with --data, or --tasks of lm_eval")


def _on_tasks(
    opened: Opened,
    names: str,
    folder: str | None,
    device: str | None,
    offload: str,
    data: DataConfig,
    limit: int | None,
    *,
    as_chat: bool,
) -> Any:
    """The figures of lm_eval's tasks."""
    from qrosa.eval.harness import Tasks

    console, place = progress_console(), choose_device(device)
    tasks = Tasks([name.strip() for name in names.split(",") if name.strip()], folder)
    tokenizer = opened.tokenizer(data.chat_template)
    model = load(opened, place, console, offload)
    return tasks.score(model, tokenizer, limit=limit, longest=data.seq_len, as_chat=as_chat)


def _scored(model: Any, tokenizer: Any, rows: Any, train: TrainConfig, progress: Any) -> Any:
    """The figures of rows, or what compares them."""
    from qrosa.eval.generate import padding_token
    from qrosa.eval.perplexity import MAX_TOKENS
    from qrosa.eval.preferences import preference_result, sum_preferences
    from qrosa.eval.tasks import evaluate_tasks

    if not train.goal.compares:
        return evaluate_tasks(model, tokenizer, rows, progress=progress)
    pad_id = padding_token(model, tokenizer)
    sums = sum_preferences(model, rows, train.goal, train, max_tokens=MAX_TOKENS, pad_id=pad_id, progress=progress)
    return preference_result(sums, train.goal)


def _show_tasks(console: Console, tasks: Any) -> None:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("task", "rows", "metric", "value"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for name, figures in tasks.items():
        rows = str(figures.get("rows", ""))
        for metric, value in figures.items():
            if metric != "rows" and "_stderr" not in metric:
                table.add_row(name, rows, metric, f"{value:.4f}")
                name = rows = ""
    console.print(table)


def _show(console: Console, result: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for key, value in result.items():
        if value is None:
            continue
        shown = f"{100 * value:.1f}%" if key in _PERCENT else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(key.replace("_", " "), shown)
    console.print(table)
