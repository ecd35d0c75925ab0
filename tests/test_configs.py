"""Every shipped recipe loads, plans, fits, and takes what its comment says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench.real_models import HUB
from qrosa.base.shape import ModelShape, from_config
from qrosa.config import make_run_config, read_yaml
from qrosa.planner.cards import CARDS, DESKTOP
from qrosa.quantities import parse_size
from tests.plans import plan

RECIPES = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


def recipe_shape(model: str) -> ModelShape:
    return from_config(model, HUB[model])


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_is_the_command_that_runs_it(path: Path) -> None:
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:4] == ["qrosa", "finetune", "--config", f"configs/{path.name}"]
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert set(flags) == {"--data", "--output"}
    config = make_run_config(read_yaml(path) | {"data": flags["--data"], "output": flags["--output"]})
    assert config.model in HUB


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.endswith("gb")], ids=lambda path: path.stem)
def test_a_recipe_fits_every_card_that_it_is_named_for(path: Path) -> None:
    """With what the driver keeps of the card, and with a desktop running."""
    sold = int(path.stem.rpartition("-")[2].removesuffix("gb"))
    smallest = min(card.memory for card in CARDS.values() if card.memory_gb == sold)
    assert parse_size(str(read_yaml(path)["vram"]), "--vram") <= smallest - DESKTOP


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_planned_memory_is_what_the_comment_says(path: Path) -> None:
    said = re.search(
        r"^# Planned peak: ([0-9.]+ [MG]iB) of ([0-9.]+ GiB) on (a card|the CPU)", path.read_text(), re.MULTILINE
    )
    assert said, "no '# Planned peak: ... of ... on ...' comment"
    config = make_run_config(read_yaml(path) | {"data": "rows.jsonl", "output": "run"})
    device = "cpu" if said[3] == "the CPU" else "cuda"
    shape = recipe_shape(config.model)
    made = plan(shape, config.adapter, config.masks, config.data, config.train, device=device)
    assert made.fits
    assert made.request.cap == parse_size(said[2].replace(" ", ""), "--vram")
    assert made.peak == pytest.approx(parse_size(said[1].replace(" ", ""), "--vram"), rel=0.005)
