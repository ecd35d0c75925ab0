"""The card that a run computes on: which one, what of its memory, and what the process takes beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qrosa.ops.determinism import deterministic
from qrosa.planner.hardware import Overhead

_PROBED = 64  # rows and columns of the products that bring in what a run brings in


def with_index(device: torch.device | str) -> torch.device:
    """A device with its index: some of torch's calls refuse a card without one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def measure_overhead(device: torch.device, free_before: int | None, *, strict: bool) -> Overhead:
    """Bring up the card as training does, and see what is gone.

    Args:
        device: A card, with its index.
        free_before: Bytes that were free before this process came to the card; unknown, the bytes of other programs
            count as this one's.
        strict: Determinism as the run will have it, since cuBLAS settles its workspace in its first call.
    """
    held = torch.cuda.memory_allocated(device)
    with deterministic(strict):
        x = torch.ones(_PROBED, _PROBED, dtype=torch.bfloat16, device=device, requires_grad=True)
        heads = (x @ x).view(1, 1, _PROBED, _PROBED)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    torch.cuda.synchronize(device)
    del heads
    x.grad = None
    workspace = torch.cuda.memory_allocated(device) - held - x.nbytes
    free, total = torch.cuda.mem_get_info(device)
    before = free_before if free_before is not None else total
    return Overhead(max(0, before - free - torch.cuda.memory_reserved(device)), max(0, workspace))


@contextmanager
def held_to(device: torch.device, cap: int | None, beside: int) -> Iterator[None]:
    """While inside, the process keeps to its part of a card.

    Args:
        device: Where the run computes, with its index; nothing is done elsewhere than on a card.
        cap: Bytes of the card that the process may take, None for all that there are.
        beside: Bytes of them that are not torch's: the driver's context, and buffers that processes talk through.
    """
    if device.type != "cuda" or cap is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, cap - beside) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
