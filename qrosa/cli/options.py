"""Options shared by the commands, made from the settings' own dataclasses, and the two places output goes.

A field of a config dataclass carries its help, choices and metavar (``qrosa.config.setting``); here it becomes
``--kebab-case``. Every such option is text with no default: what was not given stays ``None``, so that a YAML value
can stand under it, and :func:`qrosa.config.make_group` is the one place where text becomes a checked value.

``--debug`` is added to every command by the group; no command declares it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from qrosa.cli.answers import answers
from qrosa.cli.unheard import NeverFails
from qrosa.config import GROUPS

if TYPE_CHECKING:
    from rich.console import Console

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOG_WIDTH = 120  # columns of a table that does not go to a terminal


def settings_options(
    *groups: str, required: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[_Function], _Function]:
    """Give a command one option for each field of some settings groups.

    Args:
        groups: Names of groups in :data:`qrosa.config.GROUPS`: ``adapter``, ``masks``, ``data``, ``train``.
        required: Fields that the command line must give (leave empty where a config file may give them).
        only: The fields to offer, if not all of them.

    Returns:
        A decorator. The command receives each field by name, as text or ``None``:
        ``make_group(DataConfig, settings)`` turns them into values.
    """
    options = [
        _option(field, typing.get_type_hints(GROUPS[name])[field.name], required=field.name in required)
        for name in groups
        for field in dataclasses.fields(GROUPS[name])
        if only is None or field.name in only
    ]

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):  # decorators stack from the inside out
            function = option(function)
        return function

    return decorate


def model_option(*, required: bool = True) -> Callable[[_Function], _Function]:
    """``--model``: where the base comes from."""
    return click.option(
        "--model",
        metavar="ID|FOLDER|FILE",
        required=required,
        shell_complete=_completer(None, "ID|FOLDER|FILE"),
        help="The base: a Hugging Face id, a folder of safetensors (16-bit, or bitsandbytes 4-bit), or a .gguf file.",
    )


def json_option(function: _Function) -> _Function:
    """``--json`` -> ``as_json``: one JSON document on stdout, and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)


def force_option(function: _Function) -> _Function:
    """``--force`` -> ``force``: write over what is there."""
    return click.option("--force", is_flag=True, help="Go on where qrosa would refuse, such as an existing output.")(
        function
    )


def device_option(function: _Function) -> _Function:
    """``--device`` -> ``device``: cpu, cuda, cuda:1, or ``None`` for the card if there is one."""
    return click.option(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: the card, if there is one]"
    )(function)


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line gave; the rest of the options are ``None``."""
    return {name: value for name, value in settings.items() if value is not None}


def emit_json(document: Any) -> None:
    """Print one JSON document on stdout.

    Args:
        document: Dicts, lists, dataclasses, paths and plain values. NaN and the infinities become ``null``, since
            JSON has no word for them.
    """
    json.dump(_plain(document), answers(), indent=2, allow_nan=False, ensure_ascii=False)
    answers().write("\n")
    answers().flush()


def result_console() -> Console:
    """Stdout, for the result that a person asked for (a table, an answer). Not used under ``--json``."""
    return _console(stderr=False)


def progress_console() -> Console:
    """Stderr, for progress, notices and warnings; right under ``--json`` too."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = cast(IO[str], NeverFails(sys.stderr)) if stderr else answers()
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=_LOG_WIDTH)


def _option(field: dataclasses.Field[Any], hint: Any, *, required: bool) -> Callable[[_Function], _Function]:
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
    # A default that is not None is known here and shown; "choose for me" is explained by the help text itself.
    repeated = bool(field.metadata["repeated"])
    if field.default not in (None, ()) and "[default" not in text:
        text += f"  [default: {_shown(field.default)}]"
    metavar = field.metadata["metavar"] or _metavar(hint, field.metadata["choices"])
    return click.option(
        flag,
        field.name,
        metavar=metavar,
        required=required,
        help=text,
        multiple=repeated,
        shell_complete=_completer(field.metadata["choices"], metavar),
        callback=(lambda _context, _option, values: values or None) if repeated else None,
    )


def _completer(choices: tuple[str, ...] | None, metavar: str) -> Callable[..., list[CompletionItem]]:
    """What a shell offers as an option's value: its choices, the last of several, or files where it takes a file."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        words = choices or tuple(word for word in metavar.split("|") if word.islower())
        found = [CompletionItem(before + comma + word) for word in words if word.startswith(last)]
        if not choices and any(word in metavar for word in ("FILE", "FOLDER")):
            found.append(CompletionItem(incomplete, type="file"))
        return found

    return complete


def _metavar(hint: Any, choices: tuple[str, ...] | None) -> str:
    if choices:
        return "|".join(choices)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
