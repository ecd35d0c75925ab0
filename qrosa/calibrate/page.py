"""``report.html`` of a quantised model: what it lost, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qrosa.adapters.rank_units import layer_index
from qrosa.report.bars import heat_map
from qrosa.report.sheet import sheet

FORMS = {"original": "16 bits", "nearest": "4 bits, to nearest", "base": "4 bits, here", "repaired": "with the repair"}


def page(name: str, report: Mapping[str, Any]) -> str:
    """The page of a model called ``name`` with the contents of its ``report.json``."""
    tiles = [
        (f"perplexity, {FORMS[form]}" + won_back(found), f"{found['perplexity']:.3f}")
        for form, found in report["perplexity"].items()
    ]
    errors = report["matrices"]
    charts = [
        ("Squared output error here, as a share of the output", _heat(errors, lambda e: e["here"])),
        ("The same, rounded to nearest", _heat(errors, lambda e: e["nearest"])),
        ("Here against nearest", _heat(errors, lambda e: e["here"] / e["nearest"] if e["nearest"] else 0.0)),
    ]
    return sheet(f"qrosa quantize: {name}", tiles, charts, report["settings"])


def won_back(found: Mapping[str, Any]) -> str:
    """The share of the lost log-likelihood that a form won back, in words; empty for those that it is measured by."""
    share = found["won_back"]
    return "" if share is None or share in (0, 1) else f" ({100 * share:.0f}% won back)"


def _heat(errors: Mapping[str, Mapping[str, float]], value: Callable[[Mapping[str, float]], float]) -> str:
    cells = {(path.rpartition(".")[2], layer_index(path)): value(error) for path, error in errors.items()}
    return heat_map(cells, form=lambda share: f"{share:.2%}")
