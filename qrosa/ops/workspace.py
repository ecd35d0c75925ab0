"""The scratch that a dense weight lives in while a layer computes, and on which devices it outlives the call.

On the CPU a thread keeps one buffer for all layers, which only grows: fresh pages for each layer would cost more than
the dequantising itself. On other devices the allocator is quick and the memory is wanted back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_kept = threading.local()
_lasting = {"cpu"}


def lasts_on(device: torch.device) -> bool:
    """Whether scratch on ``device`` is kept between calls."""
    return device.type in _lasting


def scratch(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised [rows, columns] in ``like``'s dtype, on its device; where it lasts, the next call takes it."""
    if not lasts_on(like.device):
        return like.new_empty((rows, columns))
    size = rows * columns * like.element_size()
    buffer: torch.Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size or buffer.device != like.device:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        _kept.buffer = buffer
    return buffer[:size].view(like.dtype).view(rows, columns)


def release_workspace() -> None:
    """Frees this thread's scratch, for a process that is done with the model."""
    _kept.buffer = None


@contextmanager
def meta_like_cpu() -> Iterator[None]:
    """While inside, ``meta`` tensors count as the CPU's: their scratch lasts, as a simulation of the CPU needs."""
    release_workspace()
    _lasting.add("meta")
    try:
        yield
    finally:
        _lasting.discard("meta")
        release_workspace()
