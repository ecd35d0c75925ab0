"""What the data sheets say of cards and networks: memory, arithmetic, bandwidth, link.

The rate of bf16 products with fp32 accumulation is not in a GeForce's data sheet, but follows from what is: a
multiprocessor does the same number of operations in every clock of a generation (512 in GeForce since Ampere: half of
what it does with fp16 accumulation, 2048 in A100, 4096 in Hopper), times the multiprocessors, times the boost clock.
NVIDIA's architecture papers print the product for some cards, and a test holds it against those.

Sources: NVIDIA's product pages and data sheets for memory, multiprocessors (CUDA cores / 128), boost clock, bandwidth
and link; the architecture papers "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture" and "NVIDIA RTX
Blackwell GPU Architecture" for operations per clock; the data sheets "NVIDIA A100 Tensor Core GPU" (80 GB SXM), "NVIDIA
H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" (SXM). PCI-SIG for the rate of a lane, after line coding.

Each row was compared with at least one published table (reviews and specification databases that cite those pages), but
for what a comment marks with *unchecked*: that is from memory, and agrees with its neighbours in the range.

Memory is not what is printed on the box: firmware and driver keep a part, more of it under newer drivers. The table has
the lowest total that torch's out-of-memory messages show ("GPU 0 has a total capacity of ..."), or where none was
found for a card, that of one of the same size and generation, less 0.13 GiB where only drivers before R570 were seen:
that much more the newer ones keep of an RTX 3060. Seen: RTX 3060 11.76 (TencentARC/PhotoMaker#47) and 11.63 of 12288
MiB less 380 (two machines' notes on newer drivers); RTX 3070 7.78 (akshitac8/OW-DETR#46); RTX 3080 9.78
(zai-org/CogVideo#34); RTX 3090 23.70 (clovaai/deep-text-recognition-benchmark#386); RTX 4060 7.75
(ESRSchao/EdgeRegNet#2), 8 GB cards of its generation down to 7.60; RTX 4060 Ti 16 GB 15.57 of nvidia-smi's 16380 MiB;
RTX 4070 11.56; RTX 4090 23.64 (ali-vilab/VGen#104) to 23.68 of nvidia-smi's 24564 MiB; RTX 5060 Ti 16 GB 15.49, another
16 GB card 15.48; RTX 5070 11.49, as nvidia-smi's 12227 MiB less 464 reserved (shkhln/libc6-shim#14); RTX 5090 31.36
(TrajectoryCrafter/TrajectoryCrafter#20); nvidia-smi for A100 81920 and H100 81559 MiB
(modal-labs/modal-client#2797), of which torch has less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qrosa.errors import InputError

GEFORCE, A100, HOPPER = 512, 2048, 4096  # dense bf16 operations of a multiprocessor in a clock, fp32 accumulation
_LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}  # bytes a second of a PCIe lane, by generation


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: As ``--gpu`` names it.
        memory_gb: Memory that it is sold with, in binary gigabytes.
        memory_gib: What of it the driver gives to programs, in GiB.
        multiprocessors: Streaming multiprocessors.
        boost_mhz: Boost clock.
        bandwidth: Of its memory, in bytes a second.
        pcie: Generation of its link to the host.
        lanes: Lanes of that link.
        per_clock: Dense bf16 operations of a multiprocessor in a clock, accumulated in fp32.
    """

    name: str
    memory_gb: int
    memory_gib: float
    multiprocessors: int
    boost_mhz: int
    bandwidth: float
    pcie: int
    lanes: int = 16
    per_clock: int = GEFORCE

    @property
    def memory(self) -> int:
        """Bytes that programs can have of the card's memory."""
        return int(self.memory_gib * 2**30)

    @property
    def arithmetic(self) -> float:
        """Peak of dense bf16 products with fp32 accumulation, in operations a second."""
        return self.multiprocessors * self.per_clock * self.boost_mhz * 1e6

    @property
    def link(self) -> float:
        """Bytes a second over PCIe, each way."""
        return _LANE[self.pcie] * self.lanes


@dataclass(frozen=True)
class Network:
    """What joins machines.

    Attributes:
        name: As ``--network`` names it.
        rate: Bytes a second, each way.
        latency: Seconds from one machine to the next.
    """

    name: str
    rate: float
    latency: float = 50e-6


CARDS = {
    card.name: card
    for card in (
        Card("rtx3060", 12, 11.63, 28, 1777, 360e9, 4),
        Card("rtx3060ti", 8, 7.65, 38, 1665, 448e9, 4),
        Card("rtx3070", 8, 7.65, 46, 1725, 448e9, 4),
        Card("rtx3070ti", 8, 7.65, 48, 1770, 608e9, 4),  # clock unchecked
        Card("rtx3080", 10, 9.65, 68, 1710, 760e9, 4),
        Card("rtx3080ti", 12, 11.63, 80, 1665, 912e9, 4),  # unchecked
        Card("rtx3090", 24, 23.56, 82, 1695, 936e9, 4),
        Card("rtx3090ti", 24, 23.51, 84, 1860, 1008e9, 4),
        Card("rtx4060", 8, 7.6, 24, 2460, 272e9, 4, 8),
        Card("rtx4060ti", 8, 7.6, 34, 2535, 288e9, 4, 8),
        Card("rtx4060ti-16gb", 16, 15.57, 34, 2535, 288e9, 4, 8),
        Card("rtx4070", 12, 11.56, 46, 2475, 504e9, 4),
        Card("rtx4070super", 12, 11.56, 56, 2475, 504e9, 4),  # clock unchecked
        Card("rtx4070ti", 12, 11.56, 60, 2610, 504e9, 4),
        Card("rtx4070tisuper", 16, 15.57, 66, 2610, 672e9, 4),  # unchecked
        Card("rtx4080", 16, 15.57, 76, 2505, 716.8e9, 4),
        Card("rtx4080super", 16, 15.57, 80, 2550, 736e9, 4),  # unchecked
        Card("rtx4090", 24, 23.51, 128, 2520, 1008e9, 4),
        Card("rtx5060", 8, 7.48, 30, 2497, 448e9, 5, 8),
        Card("rtx5060ti", 8, 7.48, 36, 2572, 448e9, 5, 8),
        Card("rtx5060ti-16gb", 16, 15.48, 36, 2572, 448e9, 5, 8),
        Card("rtx5070", 12, 11.49, 48, 2512, 672e9, 5),
        Card("rtx5070ti", 16, 15.48, 70, 2452, 896e9, 5),
        Card("rtx5080", 16, 15.48, 84, 2617, 960e9, 5),  # 30 Gbit/s on 256 lines; tables before its launch said 32
        Card("rtx5090", 32, 31.36, 170, 2407, 1792e9, 5),
        # Not for a desk, but what measurements are often made on.
        Card("a100", 80, 79.1, 108, 1410, 2039e9, 4, per_clock=A100),
        Card("h100", 80, 79.1, 132, 1830, 3350e9, 5, per_clock=HOPPER),
        Card("h200", 141, 139, 132, 1830, 4800e9, 5, per_clock=HOPPER),
    )
}
DESKTOP = 1 << 29  # bytes of a card that a desktop takes; what a recipe leaves of the smallest card that it is for
LARGEST = max(CARDS.values(), key=lambda card: card.memory)
NETWORKS = {
    network.name: network for network in (Network("1gbe", 0.125e9), Network("10gbe", 1.25e9), Network("100gbe", 12.5e9))
}


_RATE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([kmg])bit(?:,([0-9]{1,6}(?:\.[0-9]{1,6})?)ms)?")


def find_card(name: str) -> Card:
    """A card by name; ``RTX 4090`` and ``rtx-4090`` are ``rtx4090``.

    Raises:
        InputError: It is not in the table.
    """
    wanted = _plain(name).removeprefix("nvidia").removeprefix("geforce")
    for card in CARDS.values():
        if _plain(card.name) == wanted:
            return card
    raise InputError(f"--gpu {name} is not in the table of cards", f"use one of: {', '.join(CARDS)}; or give --vram")


def find_network(name: str) -> Network:
    """A network by name, or by its rate and round trip: ``20mbit,80ms``.

    Raises:
        InputError: It is not in the table, and no rate.
    """
    plain = name.lower().replace(" ", "")
    if plain in NETWORKS:
        return NETWORKS[plain]
    found = _RATE.fullmatch(plain)
    if found is None or float(found[1]) == 0:
        hint = f"use one of: {', '.join(NETWORKS)}; or a rate with the round trip, such as 20mbit,80ms"
        raise InputError(f"--network {name} is unknown", hint)
    rate = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8
    return Network(plain, rate, float(found[3]) / 2e3) if found[3] else Network(plain, rate)


def smallest_card(memory: int, *, as_sold: bool = False) -> Card | None:
    """The card with the least memory that has ``memory`` bytes; of several the slowest. None where none has.

    Args:
        memory: Bytes.
        as_sold: Go by what is printed on the box: people say 24 GB and mean a card that is sold with them.
    """
    enough = [card for card in CARDS.values() if (card.memory_gb << 30 if as_sold else card.memory) >= memory]
    return min(enough, key=lambda card: (card.memory_gb, card.arithmetic), default=None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@dataclass(frozen=True)
class Machines:
    """What a run is to run on.

    Attributes:
        card: The card, of which all are one kind.
        gpus: Cards in a machine.
        nodes: Machines.
        network: What joins the machines; needed where there are several.

    Raises:
        InputError: Several machines and no network, or none at all.
    """

    card: Card
    gpus: int = 1
    nodes: int = 1
    network: Network | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1:
            raise InputError(f"{self.nodes} machines with {self.gpus} cards are none", "give at least one of each")
        if self.nodes > 1 and self.network is None:
            raise InputError("several machines need a network", "name it, such as 10gbe")

    @property
    def cards(self) -> int:
        """All cards."""
        return self.gpus * self.nodes
