"""What ZeRO takes on the card and the host, what it sends, and whether optimizer offload pays.

``qrosa.optim.zero.engine`` gives DeepSpeed the flat fp32 masters in pieces of a bucket; each of p processes owns the
masters and AdamW's two states of a share of them, 1 / p. Beside what plain training has:

    stage 2   an fp32 copy of the low-rank masters on every card (the sparse part's is the model's own values);
              in a step a bucket, a piece and, unless offloaded, the share's gradients twice
    stage 3   a share of that copy instead, the share's gradients, a bucket that stays; in a step two gathered pieces

With offload the share's masters and states, its gradients and one more copy (stage 2: of the masters, on their way
back; stage 3: of the gradients) are on the host; or on a drive, but for that copy and a few buffers of a sub-group.

Offload *loses* where it frees memory that nothing needs: the same settings fit without it, and every step pays for
copies over PCIe and an AdamW at the host's bandwidth. For budgets near 0.3% that is the rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrosa.optim.kinds import SHARED
from qrosa.planner.bytes.activations import FULL
from qrosa.planner.bytes.components import pinned_bytes
from qrosa.planner.workload import Workload

if TYPE_CHECKING:
    pass

ALIGNED = 1024  # elements that a process's share of a piece is a multiple of (qrosa.optim.zero.engine)
# Estimates, on the low side. Bytes a second that AdamW moves in host memory: two channels of DDR4-3200 have 51e9 at
# best, and torch's fused kernel has been seen to move 16e9 on one core of a server (24M values). Bytes a second over
# PCIe where no card is named: generation 4 on 8 lanes, or 3 on 16, have 15.8e9.
HOST_RATE = 10e9
_SENT = {None: 2, 2: 3, 3: 4}  # shares of (p - 1) / p: all-reduce; that and a gather; reduce-scatter and three gathers


def _share(work: Workload, parameters: int) -> int:
    """Masters of ``parameters`` that a process owns."""
    multiple = work.processes * ALIGNED
    return -(-parameters // multiple) * ALIGNED


def _piece(work: Workload) -> int:
    assert work.zero is not None
    multiple = work.processes * ALIGNED
    return max(multiple, work.zero.bucket // multiple * multiple)


def resident_bytes(work: Workload, low: int, high: int) -> dict[str, int]:
    """Component -> bytes that last on the device, in place of plain training's optimizer."""
    assert work.zero is not None
    share = _share(work, low) + _share(work, high)
    owned = 0 if work.zero.offload else 3 * FULL * share
    if work.zero.stage == 2:
        bucket = FULL * min(_piece(work), max(low, high)) if work.zero.offload else 0
        return {"optimizer": FULL * low + owned, "deepspeed_buckets": bucket}
    gradients = 0 if work.zero.offload else FULL * share
    return {"optimizer": FULL * share + gradients + owned, "deepspeed_buckets": FULL * work.zero.bucket}


def step_bytes(work: Workload, low: int, high: int) -> int:
    """Bytes that come and go in an update, on the device."""
    assert work.zero is not None
    piece, share = min(_piece(work), max(low, high)), _share(work, low) + _share(work, high)
    if work.zero.stage == 3:
        return FULL * 4 * piece  # two that are gathered, a gradient, and its reduced share
    return FULL * (work.zero.bucket + 2 * piece + (0 if work.zero.offload else 2 * share))


def host_bytes(work: Workload, low: int, high: int) -> dict[str, int]:
    """Component -> bytes in host memory, for this process."""
    assert work.zero is not None
    zero, shares = work.zero, [_share(work, low), _share(work, high)]
    if zero.offload is None:
        return {}
    if zero.offload == "nvme":
        buffers = int(zero.zero["offload_optimizer"]["buffer_count"])
        each = _pinned(work, min(max(shares), zero.sub_group))
        return {"offloaded_optimizer": buffers * each + _pinned(work, sum(shares))}
    states = 2 * FULL * sum(shares)
    if zero.stage == 2:  # masters, gradients and the copy, a buffer for each part; and a piece
        pinned = sum(3 * _pinned(work, share) for share in shares) + _pinned(work, min(_piece(work), max(low, high)))
    else:  # masters are not pinned, gradients are in buffers of a sub-group, and once more in one
        groups = [min(zero.sub_group, share - start) for share in shares for start in range(0, share, zero.sub_group)]
        pinned = FULL * sum(shares) + sum(_pinned(work, group) for group in groups) + _pinned(work, sum(shares))
    return {"offloaded_optimizer": states + pinned}


def _pinned(work: Workload, elements: int) -> int:
    """A pinned fp32 buffer, as torch allocates it."""
    return FULL * elements if work.on_cpu else pinned_bytes(FULL * elements)


def drive_bytes(work: Workload) -> int:
    """Bytes on the NVMe drive: masters, states and gradients of this process's share."""
    if work.zero is None or work.zero.offload != "nvme":
        return 0
    allocation = work.allocation
    return 4 * FULL * (_share(work, allocation.low_rank_parameters) + _share(work, allocation.sparse_parameters))


def sent_bytes(work: Workload, cards: int) -> float:
    """Bytes that each card sends, and receives, in a step."""
    times = _SENT[work.zero.stage if work.zero is not None else None]
    return times * (cards - 1) / cards * FULL * work.allocation.trainable


def offload_seconds(work: Workload, link: float, bandwidth: float) -> float:
    """Time that an offloaded step takes beyond one on the card: both ways over PCIe, and AdamW at the host's rate."""
    share = work.allocation.trainable / work.processes
    on_card = SHARED.step_bytes * share / bandwidth if bandwidth else 0.0
    return 2 * FULL * share / link + SHARED.step_bytes * share / HOST_RATE - on_card
