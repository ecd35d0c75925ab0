"""The finetune command: settings from files and flags, dry runs, signals, and what people see."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qrosa.cli.finetune import command, overlay, resolve
from qrosa.errors import DoesNotFitError, InputError
from qrosa.optim.rates import choose_rates


@pytest.fixture
def arguments(tiny_model_dir, tiny_rows, tmp_path):
    return [
        "--model", str(tiny_model_dir()), "--data", str(tiny_rows(count=24)), "--budget", "4%", "--batch-size", "6",
        "--max-steps", "4", "--lr", "5e-3", "--mask-samples", "4", "--output", str(tmp_path / "run"),
    ]  # fmt: skip


def qrosa(*arguments, **environment):
    """The real command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path.cwd()), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "qrosa.cli.main", "finetune", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_ends_with_its_figures_as_json(arguments, tmp_path):
    process = qrosa(*arguments, "--eval-split", "20%", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["steps"] == 4
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert "step 1/4" in err and "step 4/4" in err  # plain lines where there is no terminal
    assert "tokens/s" in err and "planned" in err and "left" in err
    assert "held-out loss" in err


def test_sigterm_leaves_with_130_and_resume_needs_nothing_but_the_folder(arguments, tmp_path):
    run = tmp_path / "run"
    arguments[arguments.index("--max-steps") + 1] = "60"
    process = qrosa(*arguments)
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "error: stopped by SIGTERM" in err
    assert f"hint: go on with: qrosa finetune --resume --output {run}" in err
    done = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert (run / "checkpoints" / f"step-{done[-1]}" / "state.json").is_file()
    resumed = CliRunner().invoke(command, ["--resume", "--output", str(run)])
    assert resumed.exit_code == 0, resumed.output
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in steps if line["phase"] != "select"] == list(range(1, 61))


def test_a_dry_run_shows_plan_and_rows_and_writes_nothing(arguments, tmp_path):
    result = CliRunner().invoke(command, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "fits" in result.output
    assert "24 rows (prompt-completion)" in result.output
    assert result.output.count("[[") == 3  # the learnt part of three rows
    assert "positive" in result.output.split("[[")[1].split("]]")[0]
    assert "4 steps of 6 rows" in result.output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_which_answer_is_which(tiny_model_dir, tiny_rows):
    """Of the rows that are compared, and that a step is counted in pairs."""
    pair = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
    judged = [{"prompt": "the film was", "completion": " good", "label": label} for label in (False, True, False)]
    shown = {}
    for objective, rows in (("dpo", [pair] * 3), ("kto", judged)):
        data = tiny_rows(rows, name=f"{objective}.jsonl")
        asked = ["--model", str(tiny_model_dir()), "--data", str(data), "--rank", "2", "--objective", objective]
        shown[objective] = CliRunner().invoke(command, [*asked, "--dry-run"]).output
    first = [line.partition(":")[2] for line in shown["dpo"].splitlines() if line.startswith("--- ")]
    assert first == ["1: chosen", "1: rejected", "2: chosen"] and "two rows each" in shown["dpo"]
    first = [line.partition(":")[2] for line in shown["kto"].splitlines() if line.startswith("--- ")]
    assert first == ["1: not wanted", "2: wanted", "3: not wanted"] and "two rows each" not in shown["kto"]


def test_a_dry_run_needs_no_output_and_speaks_json(arguments):
    del arguments[-2:]
    result = CliRunner().invoke(command, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fits"] is True


def test_a_plan_that_does_not_fit_leaves_with_3(arguments, tmp_path):
    refused = CliRunner().invoke(command, [*arguments, "--vram", "1MB"]).exception
    assert isinstance(refused, DoesNotFitError)
    assert refused.exit_code == 3
    assert "use a smaller model" in refused.hint or "would fit" in refused.hint
    assert not (tmp_path / "run").exists()


def test_help_has_examples_and_every_setting():
    from qrosa.config import setting_names

    text = CliRunner().invoke(command, ["--help"]).output
    assert "Examples:" in text
    for name in setting_names():
        assert f"--{name.replace('_', '-')}" in text


def write_yaml(path, **values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_flags_win_over_the_config_file(tmp_path):
    recipe = write_yaml(tmp_path / "r.yaml", model="m", data="d", budget="0.3%", epochs=3, lr=1e-3, output="there")
    config = resolve(recipe, {"lr": "5e-4", "max_steps": "7", "output": None}, resume=False, dry_run=False)
    assert config.train.lr == 5e-4
    assert (config.train.max_steps, config.train.epochs) == (7, None)
    assert config.output == "there"


def test_a_run_to_resume_lends_its_settings(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_yaml(run / "config.yaml", model="m", data="d", budget="0.3%", epochs=2.0, lr=1e-3, output=str(run))
    config = resolve(None, {"output": str(run), "keep": "9"}, resume=True, dry_run=False)
    assert (config.model, config.train.lr, config.train.epochs, config.train.keep) == ("m", 1e-3, 2.0, 9)


@pytest.mark.parametrize(
    ("above", "gone"),
    [
        ({"max_steps": 1}, {"epochs"}),
        ({"rank": 4}, {"budget"}),
        ({"eval_data": "f"}, {"eval_split"}),
        ({"seed": 1}, set()),
        ({"max_steps": None}, set()),
    ],
)
def test_a_setting_replaces_what_it_contradicts(above, gone):
    below = {"epochs": 2, "budget": "1%", "eval_split": "5%", "seed": 3}
    merged = overlay(below, above)
    assert set(below) - set(merged) == gone


def test_a_missing_setting_is_named():
    with pytest.raises(InputError, match="--model is missing"):
        resolve(None, {"data": "d", "output": "o", "budget": "1%"}, resume=False, dry_run=False)


def test_the_live_line_shows_loss_speed_memory_and_time_left():
    import io

    from rich.console import Console

    from qrosa.cli.live import LiveProgress, make_progress
    from qrosa.record.logs import StepRecord

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, highlight=False)
    progress = make_progress(console)
    assert isinstance(progress, LiveProgress)
    progress.on_phase("load", 1, 2)
    progress.on_step(StepRecord(3, "warmup", 1.2345, 1e-3, 0.5, 400, 40, 987.6, 2**30, 10, 2**31, 75.0))
    progress.on_notice("something [odd]")
    progress.on_end()
    text = out.getvalue()
    for words in ("loading", "warm-up", "1.2345", "988 tokens/s", "1.00 GiB of 2.00 GiB planned", "1:15 left", "[odd]"):
        assert words in text


def test_auto_stands_over_a_rate_of_the_config_file(tmp_path):
    recipe = write_yaml(tmp_path / "r.yaml", model="m", data="d", budget="0.3%", lr=0.5, sparse_lr=0.5, output="there")
    config = resolve(recipe, {"lr": "auto", "sparse_lr": "auto"}, resume=False, dry_run=False)
    assert (config.train.lr, config.train.sparse_lr) == (None, None)
    with pytest.raises(InputError, match="--lr 'many' is not a number"):
        resolve(recipe, {"lr": "many"}, resume=False, dry_run=False)
    with pytest.raises(InputError, match="--lr 0 is not above zero"):
        resolve(recipe, {"lr": "0"}, resume=False, dry_run=False)


def test_rates_by_rule_are_told_used_and_kept(arguments, tmp_path):
    at = arguments.index("--lr")
    process = qrosa(*arguments[:at], *arguments[at + 2 :])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    rates = choose_rates(width=64, steps=4)
    assert rates.reason in err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["lr"], kept["sparse_lr"]) == (rates.low_rank, rates.sparse)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if step["phase"] != "select")
    assert first["lr"] == pytest.approx(rates.low_rank / 2)  # the rise over the first of four steps
