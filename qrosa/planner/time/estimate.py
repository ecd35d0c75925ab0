"""Step time on a card that is not here: an estimate, from arithmetic, bytes and the data sheet.

Copies over PCIe run beside the layers, so only what outlasts them counts. Where a model is small, the host takes longer
to start the kernels than the card to run them. Several cards share the rows of a step and add up the adapter's
gradients at its end, which is all that travels between them.

Every row is taken to be as long as the longest, and all its tokens supervised. Good for comparing settings and cards;
the seconds themselves are rough.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qrosa.optim.kinds import OPTIMIZERS
from qrosa.planner.bytes.phases import traffic
from qrosa.planner.bytes.zero import offload_seconds, sent_bytes
from qrosa.planner.cards import Card, Machines
from qrosa.planner.time.cost import BANDWIDTH_SHARE, Cost, passes
from qrosa.planner.time.meetings import Meeting
from qrosa.planner.workload import Workload
from qrosa.quantities import bytes_text

LINK_SHARE = 0.8  # pinned copies over PCIe
NETWORK_SHARE = 0.9  # TCP over Ethernet
DISK_RATE = 3e9  # bytes a second of an NVMe drive, reading
HOST_SECONDS = 0.0008  # to start the kernels of a layer's forward pass; backward takes twice that
CARD_LATENCY = 20e-6  # seconds of a hop of the ring


@dataclass(frozen=True)
class MicroBatchTime:
    """Seconds of a micro-batch: scoring it, in the layers, in the head, and waiting for copies."""

    forward: float
    recompute: float
    backward: float
    head: float
    exposed_copies: float
    scoring: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.scoring + self.forward + self.recompute + self.backward + self.head + self.exposed_copies


def micro_batch_time(work: Workload, card: Card) -> MicroBatchTime:
    """How long a micro-batch takes.

    Blocks of the base come in during both passes; boundary activations go out during the first and come back during the
    second. The link works both ways at once.
    """
    asked, crossing = passes(work), traffic(work)
    host = HOST_SECONDS * work.shape.dims.layers
    forward = max(asked.forward.seconds(card), host)
    recompute = max(asked.recompute.seconds(card), host if work.checkpointing else 0.0)
    backward = max(asked.backward.seconds(card), 2 * host)
    link = LINK_SHARE * card.link
    scored = work.goal.passes
    scoring = max(asked.scoring.seconds(card), scored * host)
    blocks = crossing.get("base", 0) / (2 + scored) / (min(link, DISK_RATE) if work.base_on_disk else link)
    boundaries = crossing.get("activations", 0) / 2 / link
    exposed = max(0.0, max(blocks, boundaries) - forward) + max(0.0, blocks + boundaries - recompute - backward)
    exposed += scored * max(0.0, blocks - forward)
    return MicroBatchTime(forward, recompute, backward, asked.head.seconds(card), exposed, scoring)


@dataclass(frozen=True)
class Estimate:
    """A training step, estimated.

    Attributes:
        machines: Where.
        work: The settings.
        batch_size: Rows of a step, over all cards.
        micro_batches: Micro-batches of a step on the busiest card, as rows in each.
        cost: What they ask of that card.
        seconds: Part of the step -> seconds on that card; ``network`` is the last part.
        crossing: What crosses PCIe -> bytes of a step on that card.
    """

    machines: Machines
    work: Workload
    batch_size: int
    micro_batches: list[int]
    cost: Cost
    seconds: dict[str, float]
    crossing: dict[str, int]

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all cards."""
        return self.batch_size * self.work.length / self.step_seconds

    @property
    def efficiency(self) -> float:
        """Share of a step that is not spent on the network."""
        return 1.0 - self.seconds["network"] / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        """The plan document's ``estimate``."""
        return {
            "estimated": True,
            "basis": f"data sheet of {self.machines.card.name}; every row as long as the longest; round efficiencies",
            "card": self.machines.card.name,
            "step_seconds": self.step_seconds,
            "tokens_per_s": self.tokens_per_second,
            "tokens": self.batch_size * self.work.length,
            "micro_batches": len(self.micro_batches),
            "seconds": self.seconds,
            "operations": {
                name: getattr(self.cost, name) for name in ("linear", "low_rank", "head", "attention", "sparse")
            },
            "pcie": self.crossing,
            "scaling": _scaling(self) if self.machines.cards > 1 else None,
        }

    def describe(self) -> list[str]:
        """The same in words."""
        spent = [f"{name.replace('_', ' ')} {took:.2f}" for name, took in self.seconds.items() if took >= 0.005]
        lines = [
            f"estimated on {self.machines.card.name}: {self.step_seconds:.2f} s a step of {self.batch_size} rows of "
            f"{self.work.length} tokens, {self.tokens_per_second:,.0f} tokens/s ({', '.join(spent)})"
        ]
        lines += traffic_words(self.crossing)
        if self.machines.cards > 1:
            lines += _scaling_words(self)
        return lines


def estimate(work: Workload, batch_size: int, machines: Machines) -> Estimate:
    """Estimate a training step of ``batch_size`` rows over all cards, each as long as the longest."""
    micro_batches = micro_batch_rows(work, -(-batch_size // machines.cards))
    scored = ("scoring",) if work.goal.compares else ()
    seconds = dict.fromkeys((*scored, "forward", "recompute", "backward", "head", "exposed_copies"), 0.0)
    cost = Cost()
    for rows in micro_batches:
        sized = _sized(work, rows)
        took, cost = micro_batch_time(sized, machines.card), cost + passes(sized).total
        for part in seconds:
            seconds[part] += getattr(took, part)
    seconds["optimizer"] = _optimizer_seconds(work, machines.card)
    between = all_reduce_seconds(work, machines)
    if work.sync_every > 1:
        between /= work.sync_every
        between += all_reduce_seconds(work, dataclasses.replace(machines, nodes=1))
    seconds["network"] = between
    return Estimate(machines, work, batch_size, micro_batches, cost, seconds, step_traffic(work, micro_batches))


def _optimizer_seconds(work: Workload, card: Card) -> float:
    """The optimizer over what a card owns; offloaded, two copies and the host's bandwidth (a drive's is not known)."""
    bandwidth, zero = BANDWIDTH_SHARE * card.bandwidth, work.zero
    owned = work.allocation.trainable / (work.processes if zero is not None else 1)
    offloaded = offload_seconds(work, card.link, bandwidth) if zero is not None and zero.offload is not None else 0.0
    return OPTIMIZERS[work.optimizer].step_bytes * owned / bandwidth + offloaded


def micro_batch_rows(work: Workload, rows: int) -> list[int]:
    """The micro-batches that ``rows`` rows are split into, all of them as long as the longest."""
    most = min(work.rows, max(1, work.tokens // work.length))
    return [most] * (rows // most) + ([rows % most] if rows % most else [])


def step_traffic(work: Workload, micro_batches: list[int]) -> dict[str, int]:
    """Bytes that cross PCIe in a step, by what crosses."""
    crossing = [traffic(_sized(work, rows)) for rows in micro_batches]
    return {name: sum(micro_batch[name] for micro_batch in crossing) for name in traffic(work)}


def traffic_words(crossing: dict[str, int]) -> list[str]:
    """A line that says so; none where nothing crosses."""
    crossed = [f"{name} {bytes_text(size)}" for name, size in crossing.items() if size]
    return [f"over PCIe in a step: {', '.join(crossed)}"] if crossed else []


def _sized(work: Workload, rows: int) -> Workload:
    return dataclasses.replace(work, rows=rows, tokens=rows * work.length)


def all_reduce_bytes(work: Workload, cards: int) -> float:
    """Bytes that each card sends, and receives, in a step: a ring's 2 (n - 1) / n of the flat fp32 gradients.

    DeepSpeed sends the masters as well.
    """
    return sent_bytes(work, cards)


def all_reduce_seconds(work: Workload, machines: Machines) -> float:
    """A ring's all-reduce of the adapter's gradients, once a step and after backward, so nothing hides it.

    A ring through all cards enters and leaves each machine once, and is as fast as its slowest link. GeForce cards
    reach each other through host memory: two crossings of PCIe for one hop. The two flat gradients go one by one.
    """
    cards = machines.cards
    if cards == 1:
        return 0.0
    rate, latency = float("inf"), 0.0
    if machines.gpus > 1:
        rate, latency = LINK_SHARE * machines.card.link / 2, CARD_LATENCY
    if machines.network is not None and machines.nodes > 1:
        rate, latency = min(rate, NETWORK_SHARE * machines.network.rate), machines.network.latency
    flats = sum(size > 0 for size in (work.allocation.low_rank_parameters, work.allocation.sparse_parameters))
    return all_reduce_bytes(work, cards) / rate + flats * 2 * (cards - 1) * latency


def meeting_of(made: Estimate) -> Meeting | None:
    """What the machines of a run pay for their exchanges; None for one machine."""
    machines, work = made.machines, made.work
    if machines.nodes == 1:
        return None
    inside = all_reduce_seconds(work, dataclasses.replace(machines, nodes=1))
    step = made.step_seconds - made.seconds["network"] + inside
    sent = round(all_reduce_bytes(work, machines.cards))
    return Meeting(work.sync_every, sent, all_reduce_seconds(work, machines), step)


def _scaling(made: Estimate) -> dict[str, Any]:
    machines, meeting = made.machines, meeting_of(made)
    alone = estimate(dataclasses.replace(made.work, processes=1), made.batch_size, Machines(machines.card))
    return {
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "network": machines.network.name if machines.network and machines.nodes > 1 else None,
        "bytes_per_card": round(all_reduce_bytes(made.work, machines.cards)),
        "network_seconds": made.seconds["network"],
        "efficiency": made.efficiency,
        "speedup": alone.step_seconds / made.step_seconds,
        "meeting": meeting.to_json() if meeting else None,
        "idle_cards": max(0, machines.cards - made.batch_size),
    }


def _scaling_words(made: Estimate) -> list[str]:
    scaling, machines = _scaling(made), made.machines
    joined = f", {scaling['network']}" if scaling["network"] else ""
    meeting = meeting_of(made)
    sent = f"{bytes_text(scaling['bytes_per_card'])} of adapter gradients a step in {scaling['network_seconds']:.2f} s"
    lines = [
        f"{machines.cards} cards ({machines.gpus} a machine, {machines.nodes} machines{joined}), estimated: efficiency "
        f"{made.efficiency:.0%}, {scaling['speedup']:.1f} times one card" + ("" if meeting else f"; each sends {sent}")
    ]
    if meeting is not None:
        lines.append(meeting.describe(scaling["network"]))
    idle = scaling["idle_cards"]
    if idle:
        lines.append(f"{idle} cards have nothing to do: a step has {made.batch_size} rows; raise --batch-size")
    return lines
