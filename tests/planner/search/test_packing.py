"""Which plans pack rows, what they then count, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.real_models import MODELS
from qrosa.base.shape import from_config
from qrosa.config import TrainConfig
from qrosa.data.order import cut, longest_of_any_step, padded_share, step_rows
from qrosa.errors import InputError
from qrosa.planner.plan import Plan
from qrosa.planner.reasons import reasons
from qrosa.planner.request import Rows, known_rows, make_request
from qrosa.planner.search.alternatives import alternatives
from qrosa.planner.search.solve import solve
from qrosa.planner.search.whatif import what_if
from tests.plans import GB, NO_CARD, make_groups

LLAMA = from_config("Llama-3.1-8B", MODELS["Llama-3.1-8B"].config)
UNEVEN = [1000] + [50 + index % 300 for index in range(400)]
EVEN = [256] * 400
LONG: dict[str, Any] = {
    "micro_batch": "2", "seq_len": "60000", "offload": "none", "checkpointing": "on", "vram": 70 * GB
}  # fmt: skip


def planned(lengths: list[int], shape: object = LLAMA, vram: int = 24 * GB, **changes: object) -> Plan:
    groups = make_groups({"budget": "0.3%", "sparse_share": "0"} | changes)
    rows = known_rows(lengths, groups.train, longest=max(lengths), tokens=sum(lengths)) if lengths else Rows()
    return solve(make_request(shape, groups, NO_CARD, rows=rows, vram=vram))  # type: ignore[arg-type]


def test_rows_are_packed_where_padding_is_much() -> None:
    uneven, even, unknown = planned(UNEVEN), planned(EVEN), planned([])
    assert uneven.work.packed and uneven.settings["packing"] is True
    assert "would be padding" in reasons(uneven)["packing"]
    assert not even.work.packed and reasons(even)["packing"] == "0.0% of the tokens are padding"
    assert not unknown.work.packed and "fill seq-len" in reasons(unknown)["packing"]
    assert planned(EVEN, packing="on").work.packed
    off = planned(UNEVEN, packing="off")
    assert not off.work.packed and "turned off" in reasons(off)["packing"]


def test_a_packed_micro_batch_has_the_tokens_of_its_rows() -> None:
    """Each row may come twice into a step that spans two epochs, so the longest counts twice."""
    padded, packed = (
        planned(UNEVEN, micro_batch="4", packing=packing, checkpointing="on") for packing in ("off", "on")
    )
    assert padded.work.tokens == 4 * 1000
    assert packed.work.tokens == 2 * 1000 + 2 * 349 and packed.work.rows == 4
    assert packed.peak < padded.peak
    assert planned(UNEVEN, micro_batch="4", packing="on", seq_len="300").work.tokens == 4 * 300


def test_no_row_order_has_more_tokens_than_are_planned() -> None:
    lengths = [90, 70, 5, 4, 3, 2, 1]
    for batch in (1, 3, 7, 16, 20):
        most = sum(longest_of_any_step(lengths, batch))
        for seed in range(30):
            steps = ([lengths[place] for place in step_rows(7, batch, step, seed)] for step in range(12))
            assert all(sum(step) <= most for step in steps)


def test_packed_rows_need_no_mask() -> None:
    """But for rows that are longer than a sliding window."""
    padded, packed = (planned([60_000, 60_000, 100], packing=packing, **LONG) for packing in ("off", "on"))
    assert padded.phases["train"].device["masks"] == 2 * 60_000**2 and "masks" not in packed.phases["train"].device
    assert not padded.fits and packed.fits
    sliding = dataclasses.replace(LLAMA, dims=dataclasses.replace(LLAMA.dims, sliding_window=4096))
    windowed = planned([5000, 100], sliding, packing="on", checkpointing="on", seq_len="5000")
    assert windowed.phases["train"].device["masks"] == 5000**2


def test_packing_is_named_where_padded_rows_do_not_fit() -> None:
    padded = planned([60_000, 60_000, 59_900], **LONG)
    assert not padded.fits and not padded.work.packed
    assert ("packing", "on") in [(way.setting, way.value) for way in alternatives(padded)]
    assert planned([60_000, 60_000, 59_900], packing="on", **LONG).fits


def test_what_if_asks_for_rows_of_the_planned_length() -> None:
    found = planned(UNEVEN)
    recomputed = next(row for row in what_if(found) if row.words == "recompute")
    assert recomputed.largest_micro_batch is not None
    tried = planned([1000] * 400, micro_batch=str(recomputed.largest_micro_batch), batch_size="999", packing="on",
                    checkpointing="on", offload="none")  # fmt: skip
    assert tried.fits


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_compared_answers_and_unknown_families_are_padded(packing: str) -> None:
    strange = dataclasses.replace(LLAMA, dims=dataclasses.replace(LLAMA.dims, family="mamba"))
    found = planned(UNEVEN, strange, packing=packing)
    assert not found.work.packed and "family mamba" in reasons(found)["packing"]
    for objective in ("dpo", "kto"):
        compared = planned(UNEVEN, objective=objective, packing=packing)
        assert not compared.work.packed and "compared are padded" in reasons(compared)["packing"]


def test_what_cannot_be_packed_is_refused() -> None:
    strange = dataclasses.replace(LLAMA, dims=dataclasses.replace(LLAMA.dims, family="mamba"))
    with pytest.raises(InputError, match="family mamba") as refused:
        planned(UNEVEN, strange, packing="on")
    assert "--packing" in refused.value.hint
    with pytest.raises(InputError, match="contradict"):
        TrainConfig(objective="dpo", packing="on")


def test_a_cut_takes_what_fits() -> None:
    lengths = [3, 9, 5, 5, 1]
    assert list(cut(lengths, max_rows=9, max_tokens=10)) == [[1], [2, 3], [0, 4]]
    assert list(cut(lengths, max_rows=9, max_tokens=10, packed=True)) == [[1], [2, 3], [0, 4]]
    assert list(cut(lengths, max_rows=9, max_tokens=19, packed=True)) == [[1, 2, 3], [0, 4]]
    assert list(cut(lengths, max_rows=2, max_tokens=19, packed=True)) == [[1, 2], [3, 0], [4]]
    assert list(cut([30], max_rows=2, max_tokens=19, packed=True)) == [[0]]
    assert padded_share([lengths], max_rows=9, max_tokens=10) == pytest.approx(2 / 25)
    assert padded_share([], max_rows=9, max_tokens=10) == 0.0
