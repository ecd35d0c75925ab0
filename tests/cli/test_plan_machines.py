"""``qrosa plan --gpu --gpus --nodes --network``: estimates and what-if rows as a user asks for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.real_models import write_config
from qrosa.cli.main import cli
from qrosa.planner.cards import find_card

GB = 2**30


def run(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", "--model", str(folder), "--budget", "0.3%", *arguments])


def document(folder: Path, *arguments: str) -> dict[str, Any]:
    result = run(folder, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("models"), "Llama-3.1-8B")


def test_a_named_card_is_planned_for_and_its_step_estimated(llama: Path) -> None:
    made = document(llama, "--gpu", "RTX 4090")
    assert made["vram"] == find_card("RTX 4090").memory and made["settings"]["device"] == "cuda"
    assert made["estimate"]["estimated"] is True and made["estimate"]["card"] == "rtx4090"
    assert made["estimate"]["scaling"] is None
    assert all(row["tokens_per_s"] for row in made["what_if"] if row["largest_micro_batch"])


def test_vram_stands_above_the_card(llama: Path) -> None:
    made = document(llama, "--gpu", "rtx4090", "--vram", "12GB")
    assert made["vram"] == 12 * GB and made["estimate"]["card"] == "rtx4090"


def test_machines_join_over_10_gigabit_unless_told_otherwise(llama: Path) -> None:
    made = document(llama, "--gpu", "rtx3090", "--gpus", "2", "--nodes", "4")["estimate"]["scaling"]
    assert (made["gpus"], made["nodes"], made["network"]) == (2, 4, "10gbe")
    assert 0.9 < made["efficiency"] < 1 and 7 < made["speedup"] <= 8
    faster = document(llama, "--gpu", "rtx3090", "--gpus", "2", "--nodes", "4", "--network", "100gbe")
    assert faster["estimate"]["scaling"]["efficiency"] > made["efficiency"]


def test_a_slow_network_is_told_with_what_it_costs(llama: Path) -> None:
    far = ("--gpu", "rtx4090", "--nodes", "2", "--network", "20mbit,80ms")
    result = run(llama, *far, "--sync-every", "100")
    assert result.exit_code == 0 and "exchange adapters every 100 steps" in result.stdout.replace("\n", " ")
    made = document(llama, *far, "--sync-every", "100")
    assert made["settings"]["sync_every"] == made["estimate"]["scaling"]["meeting"]["sync_every"] == 100
    assert document(llama, *far)["settings"]["sync_every"] is None


def test_without_a_card_there_are_rows_and_no_estimate(llama: Path) -> None:
    made = document(llama, "--vram", "6GB")
    assert made["estimate"] is None and len(made["what_if"]) == 5
    assert made["traffic_per_step"]["activations"] >= made["traffic"]["activations"] > 0


def test_people_read_the_estimate_and_the_rows(llama: Path) -> None:
    result = run(llama, "--gpu", "rtx3060", "--vram", "6GB", "--nodes", "4", "--network", "1gbe")
    assert result.exit_code == 0 and result.stderr == ""
    for words in ("estimated on rtx3060", "over PCIe in a step", "4 cards", "What if", "least memory", "(plan)"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "voodoo2"), "not in the table"),
        (("--gpus", "2"), "needs a card"),
        (("--nodes", "2"), "needs a card"),
        (("--network", "1gbe"), "needs a card"),
        (("--gpu", "rtx4090", "--network", "10gbe"), "there is one"),
        (("--gpu", "rtx4090", "--nodes", "2", "--network", "string"), "string"),
        (("--gpu", "rtx4090", "--gpus", "0"), "gpus"),
        (("--gpu", "rtx4090", "--nodes", "many"), "nodes"),
    ],
)
def test_bad_machines_are_refused_with_a_hint(llama: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run(llama, *arguments)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stderr.startswith("error:") and "hint:" in result.stderr


def test_an_estimate_needs_no_torch(llama: Path) -> None:
    script = (
        "import sys\nfrom qrosa.cli.main import cli\n"
        f"cli(['plan', '--model', {str(llama)!r}, '--budget', '0.3%', '--gpu', 'rtx4090'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
