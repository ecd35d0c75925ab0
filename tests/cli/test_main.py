"""How commands are found, how failures read, and which exit codes they give."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import qrosa
from qrosa.cli import main as entry
from qrosa.cli import options
from qrosa.config import GROUPS, AdapterConfig, TrainConfig, make_group, setting_names
from qrosa.errors import DoesNotFitError, InputError, InterruptedRunError, StorageError, TrainingError


def run_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> Result:
    """Run a command that raises ``error``."""

    @click.command()
    def command() -> None:
        raise error

    stand_in(monkeypatch, command)
    return CliRunner().invoke(entry.cli, list(arguments) or ["fail"])


def stand_in(monkeypatch: pytest.MonkeyPatch, command: click.Command) -> None:
    """Make ``qrosa fail`` run ``command``."""
    module = type(sys)("qrosa.cli.stand_in")
    module.command = command  # type: ignore[attr-defined]
    module.__spec__ = entry.importlib.util.find_spec("qrosa.cli.options")
    monkeypatch.setitem(sys.modules, "qrosa.cli.stand_in", module)
    monkeypatch.setitem(entry.COMMANDS, "fail", ("qrosa.cli.stand_in", "Fails."))


def test_help_answers_fast_and_lists_only_what_is_built() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qrosa.cli.main", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 2.0  # 0.1 s on a free core; the limit leaves room for a loaded machine
    for name, (module, line) in entry.COMMANDS.items():
        built = Path(qrosa.__file__).parent.joinpath("cli", f"{module.rpartition('.')[2]}.py").exists()
        assert (f"  {name} " in done.stdout) == built
        assert not built or line.split(",")[0] in done.stdout


def test_a_command_without_its_module_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.COMMANDS, "serve", ("qrosa.cli.serve", "Not built."))
    assert "serve" not in CliRunner().invoke(entry.cli, ["--help"]).output
    assert CliRunner().invoke(entry.cli, ["serve"]).exit_code == 2


def test_no_arguments_shows_the_help() -> None:
    done = CliRunner().invoke(entry.cli, [])
    assert done.exit_code == 0
    assert done.stdout.startswith("Usage: qrosa") or "Commands:" in done.stdout


def test_version() -> None:
    assert CliRunner().invoke(entry.cli, ["--version"]).stdout == f"qrosa {qrosa.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["docter"], "no such command 'docter'", "did you mean 'doctor'?"),
        (["zzzz"], "no such command 'zzzz'", "'qrosa --help' lists the commands"),
        (["doctor", "--jsn"], "no such option --jsn", "did you mean '--json'?"),
        (["--verson"], "no such option --verson", "did you mean '--version'?"),
        (["doctor", "extra"], "got unexpected extra argument (extra)", "--help' shows what is accepted"),
    ],
)
def test_usage_errors_read_like_all_others(arguments: list[str], message: str, hint: str) -> None:
    done = CliRunner().invoke(entry.cli, arguments)
    first, second = done.stderr.splitlines()
    assert done.exit_code == 2
    assert first == f"error: {message}"
    assert second.startswith("hint: ")
    assert hint in second
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, 2), (DoesNotFitError, 3), (TrainingError, 4), (StorageError, 5), (InterruptedRunError, 130)],
)
def test_each_error_class_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, kind: Any, code: int) -> None:
    done = run_failing(monkeypatch, kind("it broke", "mend it"))
    assert done.exit_code == code
    assert done.stderr == "error: it broke\nhint: mend it\n"


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback_and_the_two_lines(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    done = run_failing(monkeypatch, InputError("it broke", "mend it"), *arguments)
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("error: it broke\nhint: mend it\n")


def test_a_bug_says_so_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_failing(monkeypatch, ZeroDivisionError("division by zero\nand more"))
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first == "error: unexpected ZeroDivisionError: division by zero"
    assert "--debug" in second


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/run/x.tmp"), 5, "/data/run/x.tmp: no room left"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/run"), 5, "/root/run: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", b"/mnt/run"), 5, "/mnt/run: the file system is read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "no room left"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 5, "/a/b: not a directory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "no room left"),
        (MemoryError(), 3, "ran out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 3, "ran out of memory"),
        (OSError("no errno at all"), 1, "unexpected OSError"),
    ],
)
def test_system_faults_are_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, text: str) -> None:
    done = run_failing(monkeypatch, error)
    assert done.exit_code == code
    first, second = done.stderr.splitlines()
    assert text in first
    assert second.startswith("hint: ")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_failing(monkeypatch, KeyboardInterrupt())
    assert done.exit_code == 130
    assert done.stderr.strip() == "interrupted"


def test_an_exit_code_that_a_command_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> None:
        ctx.exit(3)

    stand_in(monkeypatch, command)
    assert CliRunner().invoke(entry.cli, ["fail"]).exit_code == 3


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from qrosa.cli.main import main; main()"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert done.stderr == ""
    assert done.returncode in (1, 141)  # click leaves with 1 where it met the closed pipe first


def test_settings_options_cover_every_field() -> None:
    values: dict[str, Any] = {}

    @click.command()
    @options.settings_options(*GROUPS)
    def command(**settings: Any) -> None:
        values.update(options.given(settings))

    done = CliRunner().invoke(command, ["--budget", "0.3%", "--sparse-lr", "1e-3", "--log-to", "wandb,trackio"])
    assert done.exit_code == 0, done.output
    assert values == {"budget": "0.3%", "sparse_lr": "1e-3", "log_to": "wandb,trackio"}
    shown = {parameter.name for parameter in command.params}
    assert shown == set(setting_names()) - {"model", "output"}
    assert make_group(AdapterConfig, values).budget == "0.3%"


@pytest.mark.parametrize(
    ("given", "below", "wanted"),
    [
        (["--keep-best"], {}, True),
        ([], {"keep_best": True}, True),
        (["--no-keep-best"], {"keep_best": True}, False),
        ([], {}, False),
    ],
)
def test_a_switch_is_a_flag_and_a_truth_in_yaml(given: list[str], below: dict[str, Any], wanted: bool) -> None:
    values: dict[str, Any] = {}

    @click.command()
    @options.settings_options("train")
    def command(**settings: Any) -> None:
        values.update(below | options.given(settings))

    assert CliRunner().invoke(command, given).exit_code == 0
    assert make_group(TrainConfig, values).keep_best is wanted


def test_yaml_reads_on_and_off_as_truths_and_they_are_taken_back() -> None:
    made = make_group(TrainConfig, {"deterministic": False, "checkpointing": True})
    assert (made.deterministic, made.checkpointing) == ("off", "on")
    with pytest.raises(InputError, match="--keep-best has the wrong type: 'maybe'"):
        make_group(TrainConfig, {"keep_best": "maybe"})
    with pytest.raises(InputError, match="--objective has the wrong type"):
        make_group(TrainConfig, {"objective": True})


def test_settings_options_can_be_required_and_chosen() -> None:
    @click.command()
    @options.settings_options("data", required=("data",), only=("data", "seq_len"))
    def command(**settings: Any) -> None:
        assert set(settings) == {"data", "seq_len"}

    assert CliRunner().invoke(command, ["--data", "x"]).exit_code == 0
    assert CliRunner().invoke(command, []).exit_code == 2


def test_help_of_a_setting_names_its_default_once() -> None:
    @click.command()
    @options.settings_options("adapter", "masks", "train")
    def command(**settings: Any) -> None: ...

    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=400).output.split())
    assert "[default: 0.03]" in text
    assert "[default: a tenth of all steps, at most 64]" in text
    assert "residual|zero" in text
    assert "[default: None]" not in text


def test_json_has_no_nan_and_keeps_paths_and_dataclasses(capsys: pytest.CaptureFixture[str]) -> None:
    options.emit_json({"loss": float("nan"), "path": Path("/a"), "adapter": AdapterConfig(budget="1%"), "n": (1, 2)})
    document = json.loads(capsys.readouterr().out)
    assert document["loss"] is None
    assert document["path"] == "/a"
    assert document["adapter"]["budget"] == "1%"
    assert document["n"] == [1, 2]


@pytest.mark.parametrize("make", [options.result_console, options.progress_console])
def test_consoles_are_wide_in_a_log(make: Callable[[], Any]) -> None:
    assert make().width >= 100 or make().is_terminal


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qrosa fin", {"finetune"}),
        ("qrosa finetune --optim", {"--optimizer"}),
        ("qrosa finetune --optimizer ad", {"adamw", "adamw8bit"}),
        ("qrosa finetune --log-to wandb,t", {"wandb,tensorboard", "wandb,trackio"}),
        ("qrosa finetune --deepspeed z", {"zero2", "zero3"}),
    ],
)
def test_a_shell_completes_commands_options_and_values(typed: str, offered: set[str]) -> None:
    environment = {
        **os.environ,
        "_QROSA_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    code = "from qrosa.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line.split(",", 1) for line in done.stdout.splitlines()]
    assert offered <= {value for kind, value in lines if kind == "plain"}


def test_the_help_of_a_command_goes_to_stdout() -> None:
    command = [sys.executable, "-m", "qrosa", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: qrosa plan" in done.stdout and "--help" in done.stdout
