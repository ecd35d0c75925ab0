"""What a quantisation is planned with, on a card that is not here and on the processor that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.real_models import write_config
from qrosa.calibrate.planned import plan
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.planner.cards import find_card


def test_less_text_takes_less(tiny_model_dir: Any, tmp_path: Path) -> None:
    few, many = (
        plan(QuantizeConfig(str(tiny_model_dir("llama")), str(tmp_path), rows=rows), on_card=True) for rows in (16, 256)
    )
    assert few.bytes["hidden"] * 16 == many.bytes["hidden"]
    assert few.cost.double == many.cost.double
    assert few.weighing == many.weighing and many.peak == max(many.bytes["total"], many.weighing)
    card = find_card("rtx3060")
    assert 0 < few.seconds_on(card) < many.seconds_on(card)


def test_weighing_an_8b_model_fits_a_12_gb_card(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    short, long = (
        plan(QuantizeConfig(str(folder), str(tmp_path / "out"), length=length), on_card=True) for length in (256, 2048)
    )
    base = 3433 * 2**20 + 2004 * 2**20  # packed and unquantised, as plans have them
    assert base < short.weighing < find_card("rtx3060").memory
    assert 3 < (long.weighing - base) / (short.weighing - base) < 8  # activations follow tokens


def test_the_processor_here_is_timed(tiny_model_dir: Any, tmp_path: Path) -> None:
    planned = plan(QuantizeConfig(str(tiny_model_dir("llama")), str(tmp_path)), on_card=False)
    seconds = planned.seconds_here()
    assert 0 < seconds < 60
    assert planned.to_json(seconds)["seconds"] == seconds
    assert "seconds" not in planned.to_json()
