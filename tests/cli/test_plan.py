"""``qrosa plan`` as a user runs it: its JSON, its exit codes, its speed, and what it imports."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.real_models import write_config
from qrosa.cli.main import cli


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_json_for_a_folder_with_nothing_but_a_config(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    result = run("--model", str(folder), "--budget", "0.3%", "--vram", "24GB", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["fits"] and document["peak"] <= document["vram"] == 24 * 2**30
    assert document["budget"]["trainable"] == 24_090_783
    assert document["settings"]["micro_batch"] >= 1 and document["settings"]["seq_len"] == 2048


def test_a_table_for_people(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Mistral-7B")
    result = run("--model", str(folder), "--rank", "16", "--density", "0.6%", "--vram", "24GB")
    assert result.exit_code == 0, result.stderr
    for words in ("mask statistics", "rank 16 on all 224 linear layers", "micro-batch-tokens", "fits:"):
        assert words in result.stdout
    assert result.stderr == ""


def test_what_does_not_fit_exits_with_3_and_still_prints_the_plan(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Qwen2.5-14B")
    asked = ("--model", str(folder), "--budget", "0.3%", "--vram", "8GB", "--offload", "none")
    result = run(*asked, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["fits"] is False and document["nearest"]
    assert result.stderr.startswith("error:") and "hint:" in result.stderr and "--vram" in result.stderr
    people = run(*asked)
    assert people.exit_code == 3 and "does not fit" in people.stdout


BAD = [
    (("--budget", "0.3%"), "--model is missing"),
    (("--model", "MODEL"), "no budget"),
    (("--model", "MODEL", "--budget", "0%"), "0%"),
    (("--model", "MODEL", "--budget", "250%"), "250%"),
    (("--model", "MODEL", "--budget", "abc"), "abc"),
    (("--model", "MODEL", "--budget", "100%", "--sparse-share", "1"), "positions"),
    (("--model", "MODEL", "--rank", "0", "--density", "0"), "trains nothing"),
    (("--model", "MODEL", "--budget", "0.3%", "--seq-len", "999999"), "more than the model reads"),
    (("--model", "MODEL", "--budget", "0.3%", "--vram", "lots"), "lots"),
    (("--model", "./nowhere", "--budget", "0.3%"), "does not exist"),
    (("--model", "MODEL", "--budget", "0.3%", "--probe", "--gpu", "rtx4090"), "--probe runs on this machine"),
    (("--model", "MODEL", "--budget", "0.3%", "--prove"), "no such option"),
    (("--model", "MODEL", "--budget", "0.3%", "--config", "nowhere.yaml"), "does not exist"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    folder = write_config(tmp_path, "Mistral-7B")
    result = run(*(str(folder) if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2, result.output
    assert says in result.stderr and "hint:" in result.stderr and result.stdout == ""


def test_a_config_file_with_a_flag_that_wins(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Mistral-7B")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {folder}\nbudget: 1%\nvram: 24GB\nlr: 0.001\n")
    share = json.loads(run("--config", str(config), "--json").stdout)["budget"]["share"]
    assert share == pytest.approx(0.01, rel=1e-3)
    share = json.loads(run("--config", str(config), "--budget", "0.3%", "--json").stdout)["budget"]["share"]
    assert share == pytest.approx(0.003, rel=1e-3)


def test_data_gives_the_longest_row(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path]) -> None:
    result = run("--model", str(tiny_model_dir("llama")), "--budget", "2%", "--data", str(tiny_rows()), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert 2 < document["settings"]["longest_row"] < document["settings"]["seq_len"] == 256
    assert document["settings"]["device"] in ("cpu", "cuda")


def test_help_shows_examples_and_the_three_depths() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "Examples:" in result.output and "--vram" in result.output
    assert "--simulate" in result.output and "--data rows.jsonl --probe" in result.output


def test_a_plan_takes_under_a_second_and_no_torch(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    script = (
        "import sys\nfrom qrosa.cli.main import cli\n"
        f"arguments = ['--model', {str(folder)!r}, '--budget', '0.3%', '--vram', '24GB', '--json']\n"
        "cli(['plan', *arguments], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    assert seconds < 3  # of a processor, whoever else is using it; some tenths on an idle core


def test_a_simulation_says_that_it_cannot_run_deepspeed(tmp_path: Path) -> None:
    """Its tensors would be plain training's, beside a plan of DeepSpeed's."""
    folder = write_config(tmp_path, "Llama-3.1-8B")
    asked = ("--model", str(folder), "--budget", "0.3%", "--vram", "24GB", "--deepspeed", "zero2", "--simulate")
    result = run(*asked)
    assert result.exit_code == 2 and "--simulate cannot run DeepSpeed" in result.stderr and "--probe" in result.stderr


def test_a_base_of_its_own_is_a_phase(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    arguments = ("--model", str(folder), "--budget", "0.3%", "--vram", "24GB", "--json")
    plain, made = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--base-rounding", "feedback")))
    assert [*made["phases"]] == ["quantise", *plain["phases"]]
    device = made["phases"]["quantise"]["device"]
    assert device["moments"] == 4 * (3 * 4096**2 + 14336**2)
    assert device["total"] < 12 * 2**30
