"""What a budget's ranks go by where that was left open."""

from __future__ import annotations

from typing import Any

import pytest

from qrosa.adapters.rank_order import with_rank_order
from qrosa.adapters.rank_units import LinearShape, RankUnit
from qrosa.config import AdapterConfig

LINEARS = [
    LinearShape(f"model.layers.{layer}.{name}", rows, columns, layer)
    for layer in range(30)
    for name, rows, columns in (("q_proj", 576, 576), ("up_proj", 1536, 576), ("down_proj", 576, 1536))
]
ONE_RANK = sum(RankUnit((linear,)).cost(1) for linear in LINEARS)
BASE = 100_000_000


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"budget": str(ONE_RANK), "sparse_share": 0.5}, "sensitivity"),  # half of the matrices get a rank
        ({"budget": str(2 * ONE_RANK), "sparse_share": 0.5}, "order"),  # one rank for each
        ({"budget": str(ONE_RANK), "sparse_share": 0.0}, "order"),
        ({"budget": str(ONE_RANK - 1), "sparse_share": 0.0}, "sensitivity"),
        ({"budget": str(ONE_RANK), "sparse_share": 1.0}, "order"),  # no ranks at all
        ({"budget": "100", "sparse_share": 0.5}, "order"),  # too few for any rank: all of it is sparse
        ({"budget": None, "rank": 4, "density": 0.001}, "order"),
    ],
)
def test_ranks_are_measured_where_some_matrices_would_have_none(settings: dict[str, Any], order: str) -> None:
    decided = with_rank_order(AdapterConfig(**settings), LINEARS, BASE)
    assert decided.rank_by == order
    assert with_rank_order(decided, LINEARS, BASE) == decided


@pytest.mark.parametrize("given", ["order", "sensitivity"])
def test_what_is_given_stays(given: str) -> None:
    for budget in (ONE_RANK, 4 * ONE_RANK):
        config = AdapterConfig(budget=str(budget), rank_by=given)
        assert with_rank_order(config, LINEARS, BASE) is config
