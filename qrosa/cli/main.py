"""The ``qrosa`` command: finds the subcommand, runs it, and turns every failure into two lines and an exit code.

Subcommands are imported when they are called and not before, so ``qrosa --help`` answers without torch. Their
one-line descriptions stand in ``COMMANDS`` for the same reason; a command whose module is not there does not show.

Failures are handled here and nowhere else. A :class:`~qrosa.errors.QrosaError` prints as ``error:`` and ``hint:``
with the exit code of its class; click's usage errors read the same way (exit code 2); operating-system faults name
the path (5); a full memory is 3; Ctrl-C is 130; anything else is a bug and says so (1). ``--debug``, before or after
the subcommand, adds the traceback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from qrosa.cli.answers import answers, stdout_for_answers
from qrosa.cli.failures import describe, drop_output, printable, suggest
from qrosa.errors import InputError
from qrosa.spinning import short_beside_others

COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("qrosa.cli.plan", "Say what a run will take, phase by phase, before anything is loaded."),
    "finetune": ("qrosa.cli.finetune", "Fine-tune a 4-bit model with low-rank and sparse adapters."),
    "eval": ("qrosa.cli.eval", "Score a model or a run on rows: loss, perplexity, accuracy."),
    "generate": ("qrosa.cli.generate", "Answer a prompt, or chat."),
    "export": ("qrosa.cli.export", "Merge a run into a model that loads without qrosa."),
    "quantize": ("qrosa.cli.quantize", "Make a better 4-bit base, with the repair of what 4 bits lost beside it."),
    "inspect": ("qrosa.cli.inspect", "Show what an adapter holds."),
    "compare": ("qrosa.cli.compare", "Compare runs: the settings that differ, losses, time and memory."),
    "doctor": ("qrosa.cli.doctor", "Check this machine: torch, card, op libraries, disk."),
}
"""Subcommand -> (module with its ``command``, the line that ``qrosa --help`` shows)."""

_BROKEN_PIPE_EXIT = 141  # 128 + SIGPIPE, what a shell reports for a program that its reader closed on
_ENVIRONMENT = {
    # How long OpenMP threads spin at a barrier before they sleep. At the default, another busy process on the machine
    # makes training 10 to 30 times slower; at this figure 4 times until ``qrosa.spinning`` notices it, a second later,
    # and an idle machine shows no difference.
    "GOMP_SPINCOUNT": "10000",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands that are built, in the order of a typical session."""
        return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand, and give it ``--debug`` like the group's."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(found, click.Command)
        if not any("--debug" in parameter.opts for parameter in found.params):
            found.params += [_debug_option(), _help_option()]
            found.add_help_option = False
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand that ``args`` start with, or suggest the nearest one."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            hint = suggest(args[0], known) or "'qrosa --help' lists the commands"
            raise InputError(f"no such command {args[0]!r}", hint)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _refuse_twice(command, ctx, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing one."""
        rows = [(name, COMMANDS[name][1]) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run as click does, but report failures in qrosa's form; see the module's docstring."""
        run: Callable[..., Any] = functools.partial(super().main, *args, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        with short_beside_others():
            _run_and_exit(lambda state: run(obj=state))


def _refuse_twice(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Refuse a flag that takes one value and is given two: the first would be passed over without a word."""
    parser = command.make_parser(click.Context(command, parent=ctx, resilient_parsing=True))
    try:
        _, _, order = parser.parse_args(list(args))
    except click.UsageError:
        return  # said again, and better, when the command itself is parsed
    for option in order:
        single = isinstance(option, click.Option) and not (option.multiple or option.is_flag or option.count)
        if single and order.count(option) > 1:
            raise InputError(
                f"{option.opts[0]} is given {order.count(option)} times, and takes one value", "give it once"
            )


def _run_and_exit(invoke: Callable[[dict[str, bool]], Any]) -> NoReturn:
    state: dict[str, bool] = {"debug": False}
    try:
        returned = invoke(state)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe shows here, where it can still be reported
        code = returned if isinstance(returned, int) else 0
    except BrokenPipeError:
        drop_output(1)
        code = _BROKEN_PIPE_EXIT
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        code = 130
    except Exception as error:
        code = _report(error, state["debug"])
    _say("", newline=False)  # what stderr still holds for a reader that has left must not fail the interpreter's exit
    sys.exit(code)


def _report(error: Exception, debug: bool) -> int:
    """Print what went wrong on stderr; returns the exit code."""
    if debug:
        import traceback

        _say("".join(traceback.format_exception(error)).rstrip("\n"))
    failure = describe(error)
    _say(f"{click.style('error:', fg='red', bold=True)} {printable(failure.message)}")
    _say(f"{click.style('hint:', fg='cyan', bold=True)} {printable(failure.hint)}")
    return failure.exit_code


def _say(text: str, *, newline: bool = True) -> None:
    """Print on stderr; where nobody can read it any more, the exit code has to do."""
    try:
        click.echo(text, err=True, nl=newline)
    except (OSError, ValueError):
        drop_output(2)


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and isinstance(ctx.obj, dict):
            ctx.obj["debug"] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="On failure, show the traceback.",
    )


def _help_option() -> click.Option:
    """click's own would print where libraries print, and that is stderr while a subcommand runs."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            click.echo(ctx.get_help(), file=answers())
            ctx.exit()

    return click.Option(
        ["-h", "--help"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show this message and exit.",
    )


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value:
        return
    from qrosa import __version__

    click.echo(f"qrosa {__version__}")
    ctx.exit()


def _set_environment() -> None:
    """Tame threads, and keep other libraries' chatter off people's terminals; what the user has set stays."""
    import logging

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # On import without the optional `kernels` package this logger warns that a CPU kernel could not be fetched
    # from a hub; the kernel is one that qrosa never calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@click.group(
    name="qrosa",
    cls=LazyGroup,
    params=[
        _debug_option(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show the version.",
        ),
    ],
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fine-tune language models on a small card: a frozen 4-bit base, low-rank and sparse adapters.

    To have a shell complete commands, options and their values: eval "$(_QROSA_COMPLETE=bash_source qrosa)" in
    ~/.bashrc; zsh_source and fish_source likewise.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        return
    _set_environment()
    ctx.with_resource(stdout_for_answers())


def main() -> NoReturn:
    """Entry point of the console script."""
    cli(prog_name="qrosa")
    raise AssertionError("unreachable: the group exits")


if __name__ == "__main__":
    main()
