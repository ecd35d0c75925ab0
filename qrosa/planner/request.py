"""What a plan is asked for: a base, settings and the memory that may be used, with nothing left to look up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qrosa.adapters.rank_order import with_rank_order
from qrosa.base.shape import ModelShape
from qrosa.config import AdapterConfig, DataConfig, Groups, MaskConfig, TrainConfig
from qrosa.data.length import row_length
from qrosa.data.order import longest_of_any_step, step_rows
from qrosa.errors import InputError
from qrosa.optim.zero.settings import ZeroSettings, zero_settings
from qrosa.planner.cards import Machines
from qrosa.planner.hardware import UNMEASURED, Here, Overhead
from qrosa.quantities import parse_size


@dataclass(frozen=True)
class Rows:
    """What is known of the rows.

    Attributes:
        longest: Tokens of the longest, None where no rows are known: then they are taken to fill ``seq_len``.
        tokens: Tokens of all of them, which lie encoded in host memory; 0 where no rows are known.
        count: How many there are; 0 where none are known.
        most: Tokens of the longest rows that one step can have, longest first; empty where no rows are known.
        steps: Tokens of the rows of the first steps; the same.
    """

    longest: int | None = None
    tokens: int = 0
    count: int = 0
    most: Sequence[int] = ()
    steps: Sequence[Sequence[int]] = ()


UNKNOWN_ROWS = Rows()
_STEPS = 64  # steps that say how much of the micro-batches is padding


def known_rows(lengths: Sequence[int], train: TrainConfig, *, longest: int, tokens: int) -> Rows:
    """What is known of rows that were read.

    Args:
        lengths: Tokens of each training row, in order; of pairs, of both.
        train: Batch size and seed.
        longest: Tokens of the longest row, held-out ones among them.
        tokens: Tokens of all rows.
    """
    if train.goal.compares:
        return Rows(longest, tokens, len(lengths))
    count = min(_STEPS, -(-len(lengths) // train.batch_size))
    places = [step_rows(len(lengths), train.batch_size, step, train.seed) for step in range(count)]
    steps = [[lengths[place] for place in step] for step in places]
    return Rows(longest, tokens, len(lengths), longest_of_any_step(lengths, train.batch_size), steps)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        shape: The base.
        adapter: Budget settings.
        masks: Mask settings.
        data: Data settings, ``seq_len`` resolved.
        train: Training settings.
        device: ``cuda`` or ``cpu``.
        cap: Bytes that may be used: of the card, or of the host.
        rows: What is known of the rows.
        machines: What to estimate the time of a step on, None for no estimate.
        host_cap: Bytes of host memory beside a card; None where device and host are one, or the host is not known.
        zero: What DeepSpeed is to do, None without it.
        processes: Processes, each with a card of its own, that share a step.
        sharing: Those of them that share a host's memory.
        pinned_cap: Bytes of host memory that may be pinned, None for no limit of its own.
        overhead: What a process takes of a card beside tensors.
        widens: Products of 16-bit floats are taken in fp32, as on a CPU that is slow at them.
    """

    shape: ModelShape
    adapter: AdapterConfig
    masks: MaskConfig
    data: DataConfig
    train: TrainConfig
    device: str
    cap: int
    rows: Rows = UNKNOWN_ROWS
    machines: Machines | None = None
    host_cap: int | None = None
    zero: ZeroSettings | None = None
    processes: int = 1
    sharing: int = 1
    pinned_cap: int | None = None
    overhead: Overhead = UNMEASURED
    widens: bool = False


def make_request(
    shape: ModelShape,
    groups: Groups,
    here: Here,
    *,
    rows: Rows = UNKNOWN_ROWS,
    vram: int | None = None,
    device: str | None = None,
    machines: Machines | None = None,
) -> Request:
    """Resolve what was asked for into a request.

    Args:
        shape: The base.
        groups: The settings.
        here: What this machine has.
        rows: What is known of the rows.
        vram: Bytes that may be used; default ``train.vram``, else what the card has free, else what the host has.
        device: ``cuda`` or ``cpu``; default a card where ``vram`` is given or a card is found.
        machines: What to estimate the time of a step on; its card's memory is the cap where none is set.

    Raises:
        InputError: Sizes that cannot be read, longer rows than the model reads, DeepSpeed settings that cannot be, rows
            to pack in a model that may not keep them apart.
    """
    train = groups.train
    if train.packing == "on" and not shape.dims.known:
        raise InputError(
            f"--packing on: rows may see each other in a model of the family {shape.dims.family}, which is not known",
            "leave --packing at auto, which pads its rows",
        )
    if vram is None and train.vram is not None:
        vram = parse_size(train.vram, "--vram")
    if vram is None and machines is not None:
        vram = machines.card.memory
    device = device or ("cuda" if vram is not None or here.card else "cpu")
    sharing = here.sharing if machines is None else machines.gpus
    cap, host_cap = _caps(groups.train, here, device, vram, sharing, elsewhere=machines is not None)
    return Request(
        shape,
        with_rank_order(groups.adapter, shape.linears, shape.base_parameters),
        groups.masks,
        dataclasses.replace(groups.data, seq_len=row_length(groups.data.seq_len, shape.dims.max_positions)),
        train,
        device,
        cap,
        rows,
        machines,
        host_cap,
        zero_settings(train),
        here.processes if machines is None else machines.cards,
        sharing,
        here.pinned // sharing if here.pinned is not None and machines is None else None,
        here.overhead if machines is None else UNMEASURED,
        here.widens and device == "cpu",
    )


def _caps(
    train: TrainConfig, here: Here, device: str, vram: int | None, sharing: int, *, elsewhere: bool
) -> tuple[int, int | None]:
    """Bytes that the run may use where it runs, and of host memory beside it (None: not known).

    Each card or process of a machine has its own of the first and a share of its host's memory.
    """
    asked = parse_size(train.host_memory, "--host-memory") // sharing if train.host_memory is not None else None
    free = here.host // sharing
    if device == "cpu":
        return min((cap for cap in (vram, asked) if cap is not None), default=free), None
    # A card that is not here stands in a host that is not here either.
    known = here.card is not None and not elsewhere
    return vram or here.card_room or here.host, asked if asked is not None else free if known else None
