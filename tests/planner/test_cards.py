"""The table of cards: what follows from the data sheets is what the makers print."""

from __future__ import annotations

import pytest

from qrosa.errors import InputError
from qrosa.planner.cards import CARDS, NETWORKS, find_card, find_network, smallest_card

GB = 2**30
# Dense bf16 with fp32 accumulation in TFLOP/s, as the architecture papers and data sheets print it.
PRINTED = {
    "rtx3070": 40.6,
    "rtx3080": 59.5,
    "rtx3090": 71.0,
    "rtx4070ti": 80.2,
    "rtx4080": 97.5,
    "rtx4090": 165.2,
    "rtx5070": 61.7,
    "rtx5070ti": 87.9,
    "rtx5080": 112.6,
    "rtx5090": 209.5,
    "a100": 312.0,
    "h100": 989.4,
    "h200": 989.4,
}


@pytest.mark.parametrize(("name", "tera"), PRINTED.items())
def test_arithmetic_is_what_the_maker_prints(name: str, tera: float) -> None:
    assert CARDS[name].arithmetic / 1e12 == pytest.approx(tera, rel=0.005)


def test_links_are_what_pcie_promises() -> None:
    assert CARDS["rtx4090"].link == pytest.approx(31.5e9, rel=0.001)  # 4.0 x16
    assert CARDS["rtx4060"].link == pytest.approx(15.75e9, rel=0.001)  # 4.0 x8
    assert CARDS["rtx5090"].link == pytest.approx(63.0e9, rel=0.001)  # 5.0 x16


# Totals that torch named in public out-of-memory messages, in GiB: the table promises no more than the lowest.
SEEN = {
    "rtx3060": (11.76, 11.63),
    "rtx3070": (7.78,),
    "rtx3080": (9.78,),
    "rtx3090": (23.70,),
    "rtx4060": (7.75,),
    "rtx4060ti-16gb": (15.60, 15.57),
    "rtx4070": (11.56,),
    "rtx4090": (23.64, 23.65, 23.68),
    "rtx5060ti-16gb": (15.49,),
    "rtx5070": (11.49,),
    "rtx5090": (31.36,),
}


@pytest.mark.parametrize(("name", "totals"), SEEN.items())
def test_no_card_is_promised_more_than_its_driver_gives(name: str, totals: tuple[float, ...]) -> None:
    assert 0.97 * min(totals) < CARDS[name].memory / GB <= min(totals)


def test_every_card_is_in_order() -> None:
    for name, card in CARDS.items():
        assert name == card.name == name.lower()
        assert 0.92 * card.memory_gb * GB < card.memory < card.memory_gb * GB and 8 <= card.memory_gb <= 141
        assert 10e12 < card.arithmetic < 1e15 and 2e11 < card.bandwidth < 5e12 and 1e10 < card.link < 7e10


@pytest.mark.parametrize("text", ["rtx4090", "RTX 4090", "RTX-4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_found_however_it_is_written(text: str) -> None:
    assert find_card(text) is CARDS["rtx4090"]


def test_what_is_not_in_the_tables_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="rtx9999") as caught:
        find_card("rtx9999")
    assert "rtx4090" in caught.value.hint and "--vram" in caught.value.hint
    with pytest.raises(InputError, match="token-ring") as caught:
        find_network("token-ring")
    assert all(name in caught.value.hint for name in NETWORKS)
    assert find_network("10GbE").rate == 1.25e9


def test_a_network_may_be_a_rate_and_a_round_trip() -> None:
    far = find_network("20Mbit,80ms")
    assert (far.rate, far.latency) == (2.5e6, 0.04)
    assert find_network("1gbit").rate == NETWORKS["1gbe"].rate
    for wrong in ("0mbit", "20", "mbit", "20mbit,80", "20mbit,,80ms", "-20mbit", "20mbit,80s"):
        with pytest.raises(InputError, match="is unknown"):
            find_network(wrong)


def test_the_smallest_card_that_is_large_enough() -> None:
    assert smallest_card(8 * GB, as_sold=True) is CARDS["rtx4060"]  # the slowest of those with 8 GB
    assert smallest_card(7 * GB) is CARDS["rtx4060"]
    assert smallest_card(8 * GB) is CARDS["rtx3080"]  # no card that is sold with 8 GB has them
    assert smallest_card(17 * GB) is CARDS["rtx3090"]
    assert smallest_card(24 * GB) is CARDS["rtx5090"] and smallest_card(24 * GB, as_sold=True) is CARDS["rtx3090"]
    assert smallest_card(1000 * GB) is None
