"""Host memory for many buffers, pinned where a card reads it, in chunks whose size is a power of two.

torch rounds every pinned buffer up to a power of two, so one buffer for each matrix of a streamed base takes up to
twice its bytes: 37 GB in place of 22 for a 32B model. Chunks of a power of two lose nothing to that, and what is left
at a chunk's end goes to the first smaller matrix that fits there. A piece keeps its chunk alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrosa.errors import DoesNotFitError
from qrosa.quantities import bytes_text

CHUNK = 1 << 28  # bytes; a small part of a base worth streaming, and some matrices of any


class HostPool:
    """Hands out pieces of host memory that are never given back one by one.

    Args:
        pinned: Lock the pages, so that a card can copy from them while it computes.
        chunk: Bytes that are taken from the system at a time, a power of two.
    """

    def __init__(self, *, pinned: bool, chunk: int = CHUNK) -> None:
        self.pinned = pinned
        self.chunk = chunk
        self._chunks: list[Tensor] = []
        self._used: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes taken from the system."""
        return sum(chunk.numel() for chunk in self._chunks)

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] in the first chunk with room, else in a new one; a larger piece is a chunk of its own."""
        for index, chunk in enumerate(self._chunks):
            start = self._used[index]
            if start + nbytes <= chunk.numel():
                self._used[index] += nbytes
                return chunk[start : start + nbytes]
        size = max(self.chunk, 1 << max(0, nbytes - 1).bit_length())
        self._chunks.append(pinned(size) if self.pinned else torch.empty(size, dtype=torch.uint8))
        self._used.append(nbytes)
        return self._chunks[-1][:nbytes]


def pinned(nbytes: int) -> Tensor:
    """uint8 [nbytes] in pinned host memory.

    Raises:
        DoesNotFitError: The system pins no more. The driver calls that "out of memory" as it does the card's, for which
            a smaller micro-batch would be tried in vain.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # torch's out-of-memory error is one
        raise DoesNotFitError(
            f"the system gives no {bytes_text(nbytes)} more of pinned host memory",
            "close other programs, raise the memory limit of WSL or the container, or use --offload base=disk:FOLDER",
        ) from error


def pinned_like(tensor: Tensor) -> Tensor:
    """Room of a tensor's shape and dtype in pinned host memory."""
    return pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
