"""Operations of calibrated rounding against a count by hand, and the time that follows on cards."""

from __future__ import annotations

import pytest

from bench.real_models import MODELS
from qrosa.base.shape import from_config
from qrosa.planner.cards import find_card
from qrosa.planner.time.calibration_cost import calibration_cost

SMOL = from_config(
    "smol",
    {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192},
)  # fmt: skip


def test_operations_of_a_model_counted_by_hand() -> None:
    tokens = 10 * 100
    by_hand = 0
    for width, values in ((576, 576 * 960), (576, 576 * 576), (576, 2 * 576 * 1536), (1536, 576 * 1536)):
        by_hand += 2 * tokens * (width**2 + 3 * values) + 4 * width**3 // 3 + 7 * values * width
    head = 6 * tokens * 576 * 49152
    cost = calibration_cost(SMOL, 10, 100)
    assert cost.operations == pytest.approx(30 * by_hand + head, rel=1e-6)
    assert cost.columns == 30 * (3 * 576 + 1536)


def test_an_8b_model_takes_minutes_on_a_desktop_card() -> None:
    cost = calibration_cost(from_config("8b", MODELS["Llama-3.1-8B"].config), 128, 256)
    slow, fast = (cost.seconds(find_card(name)) for name in ("rtx4090", "h100"))
    # GeForce cards have next to no fp64: the factors alone, 4/3 K^3 of each input, take most of it.
    factors = 32 * 4 / 3 * (3 * 4096**3 + 14336**3)
    assert cost.double == pytest.approx(factors, rel=1e-3)
    assert factors / 1.29e12 < slow < 300
    assert fast < slow / 2
