"""The page of a quantised model: its figures, and a cell for each matrix."""

from __future__ import annotations

from qrosa.calibrate.page import page


def test_shows_what_was_lost_and_where() -> None:
    report = {
        "perplexity": {
            "original": {"loss": 2.0, "perplexity": 7.389, "won_back": 1.0},
            "nearest": {"loss": 2.2, "perplexity": 9.025, "won_back": 0.0},
            "base": {"loss": 2.1, "perplexity": 8.166, "won_back": 0.5},
        },
        "matrices": {
            f"model.layers.{layer}.mlp.{name}": {"nearest": 0.02, "here": 0.01 * layer}
            for layer in (0, 1)
            for name in ("up_proj", "down_proj")
        },
        "settings": {"rows": 128},
    }
    made = page("base", report)
    assert "<h1>qrosa quantize: base</h1>" in made
    assert "8.166" in made and "(50% won back)" in made and "(100% won back)" not in made
    assert "layer 1, down_proj: 1.00%" in made and "layer 0, up_proj: 2.00%" in made
    assert made.count('class="cell"') == 3 * 4
