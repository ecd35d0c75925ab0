"""Estimates: known magnitudes of a step, and that better hardware is never slower."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.real_models import LARGE, MODELS, SMOLLM2
from qrosa.base.shape import ModelShape, from_config
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.errors import InputError
from qrosa.planner.bytes.phases import traffic
from qrosa.planner.cards import CARDS, NETWORKS, Card, Machines, find_card, find_network
from qrosa.planner.plan import Plan
from qrosa.planner.show import document
from qrosa.planner.time.cost import passes
from qrosa.planner.time.estimate import (
    Estimate,
    all_reduce_bytes,
    all_reduce_seconds,
    estimate,
    micro_batch_rows,
    micro_batch_time,
    step_traffic,
)
from qrosa.planner.workload import Workload
from tests.plans import plan

GB = 2**30
SHAPES = {name: from_config(name, model.config) for name, model in (MODELS | LARGE).items()}
LLAMA = SHAPES["Llama-3.1-8B"]
RTX4090 = CARDS["rtx4090"]


def made(shape: ModelShape = LLAMA, card: str = "rtx4090", budget: str = "0.3%", **train: Any) -> Plan:
    """A plan for a card."""
    settings_ = TrainConfig(**train)
    adapter = AdapterConfig(budget=budget)
    return plan(shape, adapter, MaskConfig(), DataConfig(), settings_, machines=Machines(CARDS[card]))


def on(work: Workload, card: Card = RTX4090, batch_size: int = 32, **more: Any) -> Estimate:
    return estimate(work, batch_size, Machines(card, **more))


WORK = made(checkpointing="on").work
STREAMED = made(card="rtx3060", vram="6GB").work


def test_a_step_is_4_n_t_and_recomputing_adds_2_n_t_but_for_the_down_projections() -> None:
    matrices = sum(linear.size for linear in LLAMA.linears)
    assert matrices == pytest.approx(6.98e9, rel=0.001)
    tokens = WORK.tokens
    plain, recomputed = (passes(dataclasses.replace(WORK, checkpointing=kept)).total for kept in (False, True))
    assert plain.linear == 4 * matrices * tokens
    assert recomputed.linear == (6 * matrices - 2 * 32 * 4096 * 14336) * tokens
    assert plain.head == 4 * 4096 * 128256 * tokens
    assert recomputed.low_rank == 8 * WORK.allocation.low_rank_parameters * tokens


def test_attention_grows_with_the_square_of_the_length() -> None:
    short, long = (passes(dataclasses.replace(WORK, length=n, tokens=8192)).total for n in (1024, 8192))
    assert long.attention / short.attention == pytest.approx(8, rel=0.01)
    # Causal: 2 products forward, 5 in backward, 2 once more; half of the 8192 x 8192 scores of each of 32 heads.
    assert long.attention == pytest.approx(9 * 2 * 8192 * 8193 / 2 * 32 * 128 * 32, rel=1e-6)
    eager = passes(dataclasses.replace(WORK, attention="eager", length=8192, tokens=8192)).total
    assert eager.attention > long.attention and eager.moved > 2 * long.moved


def test_an_8b_step_is_of_the_size_that_people_report() -> None:
    """QLoRA of an 8B model on a 24 GB card runs at one to four thousand tokens a second."""
    for card, least, most in (("rtx3090", 500, 2000), ("rtx4090", 1500, 4000), ("rtx4060", 200, 800)):
        found = made(card=card).estimate()
        assert found is not None and least < found.tokens_per_second < most


def test_the_sparse_part_is_a_few_percent_of_a_step() -> None:
    allocation = WORK.allocation
    without = dataclasses.replace(
        WORK, allocation=dataclasses.replace(allocation, nnz=dict.fromkeys(allocation.nnz, 0), sparse_parameters=0)
    )
    assert 1.0 < on(WORK).step_seconds / on(without).step_seconds < 1.03


def test_a_small_model_is_bound_by_the_host() -> None:
    work = made(from_config("smol", SMOLLM2), vram="8GB").work
    tiny = dataclasses.replace(work, tokens=256, length=256, rows=1)
    fast, slow = micro_batch_time(tiny, CARDS["rtx5090"]), micro_batch_time(tiny, CARDS["rtx4090"])
    assert fast.forward == slow.forward > 0.01


def test_micro_batches_hold_all_rows_of_a_step() -> None:
    work = dataclasses.replace(WORK, rows=4, tokens=8192, length=2048)
    assert micro_batch_rows(work, 32) == [4] * 8
    assert micro_batch_rows(work, 6) == [4, 2]
    assert micro_batch_rows(dataclasses.replace(work, length=3000), 5) == [2, 2, 1]
    assert micro_batch_rows(dataclasses.replace(work, rows=1), 3) == [1, 1, 1]


def test_traffic_of_a_step_is_that_of_its_micro_batches() -> None:
    assert STREAMED.streamed and STREAMED.offload_activations
    full = micro_batch_rows(STREAMED, 32)
    one = traffic(dataclasses.replace(STREAMED, tokens=full[0] * STREAMED.length))
    assert step_traffic(STREAMED, full) == {name: len(full) * size for name, size in one.items()}
    assert step_traffic(WORK, [4, 4]) == {}


def test_copies_hide_behind_a_busy_micro_batch_and_not_behind_a_short_one() -> None:
    busy = dataclasses.replace(STREAMED, tokens=8192, length=2048, rows=4)
    assert micro_batch_time(busy, RTX4090).exposed_copies == 0.0
    short = dataclasses.replace(STREAMED, tokens=64, length=64, rows=1, resident_blocks=0)
    exposed = micro_batch_time(short, RTX4090).exposed_copies
    assert 0.0 < exposed < sum(traffic(short).values()) / (0.8 * RTX4090.link)
    from_disk = dataclasses.replace(short, base_on_disk=True)
    assert micro_batch_time(from_disk, RTX4090).exposed_copies > 5 * exposed


CARD = st.sampled_from(sorted(CARDS)).map(CARDS.__getitem__)
WORKLOAD = st.builds(
    lambda work, rows, length, resident: dataclasses.replace(
        work, rows=rows, length=length, tokens=rows * length, resident_blocks=resident if work.streamed else None
    ),
    st.sampled_from([WORK, STREAMED, dataclasses.replace(WORK, checkpointing=False, attention="eager")]),
    st.integers(1, 8),
    st.integers(16, 4096),
    st.integers(0, 32),
)


@settings(max_examples=60, deadline=None)
@given(work=WORKLOAD, card=CARD, factor=st.floats(1.0, 4.0), part=st.sampled_from(["clock", "bandwidth", "lanes"]))
def test_a_faster_card_is_never_slower(work: Workload, card: Card, factor: float, part: str) -> None:
    faster = {
        "clock": dataclasses.replace(card, boost_mhz=int(card.boost_mhz * factor)),
        "bandwidth": dataclasses.replace(card, bandwidth=card.bandwidth * factor),
        "lanes": dataclasses.replace(card, lanes=int(card.lanes * factor)),
    }[part]
    assert on(work, faster).step_seconds <= on(work, card).step_seconds * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(gpus=st.integers(1, 8), nodes=st.integers(1, 400), batch=st.integers(1, 512), card=CARD)
def test_more_network_is_never_slower(gpus: int, nodes: int, batch: int, card: Card) -> None:
    took = [
        on(WORK, card, batch, gpus=gpus, nodes=nodes, network=NETWORKS[name]) for name in ("1gbe", "10gbe", "100gbe")
    ]
    seconds, efficiency = [found.step_seconds for found in took], [found.efficiency for found in took]
    assert seconds == sorted(seconds, reverse=True)
    assert efficiency == sorted(efficiency) and 0 < efficiency[0] <= efficiency[-1] <= 1


@settings(max_examples=60, deadline=None)
@given(cards=st.integers(1, 1000))
def test_a_ring_sends_all_but_twice_the_gradients(cards: int) -> None:
    gradients = 4 * WORK.allocation.trainable
    assert all_reduce_bytes(WORK, cards) == pytest.approx(2 * gradients * (cards - 1) / cards)
    assert all_reduce_bytes(WORK, 1) == 0 == all_reduce_seconds(WORK, Machines(RTX4090))


def test_four_cards_over_10_gigabit_pay_and_what_travels_is_small() -> None:
    found = on(WORK, nodes=4, network=NETWORKS["10gbe"])
    scaling = found.to_json()["scaling"]
    assert scaling["bytes_per_card"] == pytest.approx(1.5 * 4 * 24.09e6, rel=0.001)
    assert scaling["network_seconds"] == pytest.approx(0.129, rel=0.05)
    assert scaling["efficiency"] > 0.95 and scaling["speedup"] == pytest.approx(4, rel=0.05)
    slow = on(WORK, nodes=4, network=NETWORKS["1gbe"])
    assert slow.efficiency == pytest.approx(1 - slow.seconds["network"] / slow.step_seconds)
    assert slow.efficiency < found.efficiency < on(WORK, gpus=4).efficiency


def test_what_meetings_cost_and_from_which_number_of_steps_it_is_little() -> None:
    far = find_network("20mbit,80ms")
    often, seldom = (
        on(dataclasses.replace(WORK, sync_every=every), nodes=2, network=far).to_json() for every in (1, 50)
    )
    each, rare = often["scaling"]["meeting"], seldom["scaling"]["meeting"]
    assert each["bytes"] == rare["bytes"] == 4 * WORK.allocation.trainable
    assert each["seconds"] == rare["seconds"] == pytest.approx(each["bytes"] / (0.9 * 2.5e6), rel=0.02)
    assert seldom["seconds"]["network"] == pytest.approx(often["seconds"]["network"] / 50)
    assert rare["share"] == pytest.approx(1 - seldom["scaling"]["efficiency"])
    enough, fewer = (
        on(dataclasses.replace(WORK, sync_every=each["enough"] - less), nodes=2, network=far) for less in (0, 1)
    )
    assert fewer.efficiency < 0.95 <= enough.efficiency + 1e-12
    assert f"--sync-every {each['enough']} makes it 5%" in on(WORK, nodes=2, network=far).describe()[-1]
    assert "makes it" not in enough.describe()[-1]


def test_cards_of_one_machine_still_share_every_step() -> None:
    apart = dataclasses.replace(WORK, sync_every=10**6)
    inside = on(WORK, gpus=2).seconds["network"]
    assert on(apart, gpus=2, nodes=2, network=NETWORKS["1gbe"]).seconds["network"] == pytest.approx(inside, rel=0.01)
    assert on(apart, gpus=2).to_json()["scaling"]["meeting"] is None


def test_more_cards_than_rows_stand_idle_and_are_told_so() -> None:
    found = on(WORK, gpus=2, nodes=200, network=NETWORKS["10gbe"])
    scaling = found.to_json()["scaling"]
    assert scaling["idle_cards"] == 400 - 32 and scaling["speedup"] < 32 + 1e-9
    assert any("368 cards have nothing to do" in line for line in found.describe())
    assert on(WORK, batch_size=3200, gpus=2, nodes=200, network=NETWORKS["10gbe"]).to_json()["scaling"]["speedup"] > 300


def test_the_document_says_that_it_is_estimated_and_adds_up() -> None:
    shown = json.loads(json.dumps(document(made())))["estimate"]
    assert shown["estimated"] is True and shown["card"] == "rtx4090" and shown["scaling"] is None
    assert sum(shown["seconds"].values()) == pytest.approx(shown["step_seconds"])
    assert shown["tokens"] / shown["step_seconds"] == pytest.approx(shown["tokens_per_s"])
    assert shown["tokens"] == 32 * 2048
    assert made().estimate() is not None
    alone = plan(LLAMA, AdapterConfig(budget="1%"), MaskConfig(), DataConfig(), TrainConfig(vram="24GB"))
    assert alone.estimate() is None and document(alone)["estimate"] is None


def test_a_named_card_is_the_cap_unless_vram_says_otherwise() -> None:
    assert (
        made(card="rtx4060").request.cap == find_card("rtx4060").memory
        and made(card="rtx4060").settings["device"] == "cuda"
    )
    assert made(card="rtx4090", vram="12GB").request.cap == 12 * GB


def test_machines_without_a_network_are_refused() -> None:
    for wrong in ({"nodes": 2}, {"gpus": 0}, {"nodes": 0}):
        with pytest.raises(InputError):
            Machines(RTX4090, **wrong)


def test_words_name_the_card_the_speed_and_the_bus() -> None:
    lines = on(STREAMED, CARDS["rtx3060"], gpus=2, nodes=2, network=NETWORKS["1gbe"]).describe()
    text = "\n".join(lines)
    for words in (
        "estimated on rtx3060",
        "tokens/s",
        "over PCIe in a step: base",
        "4 cards",
        "1gbe",
        "adapter gradients",
    ):
        assert words in text
