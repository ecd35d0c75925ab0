"""Blocks of a base that lies in files, brought into pinned memory by a thread of its own, ahead of their copies.

A card copies from memory that the system has mapped from a file only by way of the driver's own staging, and then the
host waits. So a thread reads each block into one of two pinned buffers while the card computes; from there it is copied
as any pinned block is. A step then takes as long as the slowest of arithmetic, link and drive, not their sum.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qrosa.errors import StorageError
from qrosa.offload.packing import FlatWeight
from qrosa.offload.pool import pinned

BUFFERS = 2


class _Buffer:
    """Pinned room for one block.

    Attributes:
        block: What it holds or is being filled with, -1 for nothing.
        reading: The read that fills it.
        copied: Recorded behind the copy out of it; before that it must not be filled again.
    """

    def __init__(self, nbytes: int) -> None:
        self.data = pinned(nbytes)
        self.block = -1
        self.reading: Future[None] | None = None
        self.copied: torch.cuda.Event | None = None


class StagedBlocks:
    """Blocks in files, read ahead.

    Args:
        blocks: Block -> its layers, each in a file.
    """

    def __init__(self, blocks: dict[int, list[FlatWeight]]) -> None:
        self._blocks = blocks
        nbytes = max(sum(flat.nbytes for flat in flats) for flats in blocks.values())
        self._buffers = [_Buffer(nbytes) for _ in range(BUFFERS)]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="qrosa-reader")

    def expect(self, block: int) -> None:
        """Begin to read a block that will be asked for, unless it is there; over the one that was asked for last."""
        if self._find(block) is None:
            free = next((buffer for buffer in self._buffers if buffer.copied is not None or buffer.block < 0), None)
            if free is not None:
                self._fill(free, block)

    def take(self, block: int) -> Tensor:
        """The bytes of a block in pinned memory, as soon as they are read. Say when they are copied (``copied``).

        Raises:
            StorageError: A file has gone, or is shorter than it was.
        """
        buffer = self._find(block)
        if buffer is None:  # not what was expected
            buffer = next((b for b in self._buffers if b.copied is not None or b.block < 0), self._buffers[0])
            self._fill(buffer, block)
        assert buffer.reading is not None
        buffer.reading.result()
        return buffer.data

    def copied(self, block: int, event: torch.cuda.Event) -> None:
        """A block's buffer may be filled again once the card has passed ``event``."""
        buffer = self._find(block)
        assert buffer is not None
        buffer.copied = event

    def _find(self, block: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block == block), None)

    def _fill(self, buffer: _Buffer, block: int) -> None:
        before, buffer.block, copied, buffer.copied = buffer.reading, block, buffer.copied, None
        buffer.reading = self._reader.submit(_read, self._blocks[block], buffer.data, before, copied)


def _read(flats: list[FlatWeight], into: Tensor, before: Future[None] | None, copied: torch.cuda.Event | None) -> None:
    """Fill a buffer, after the read before and the copy out of it."""
    if before is not None:
        before.exception()
    if copied is not None:
        copied.synchronize()
    room, start = into.numpy(), 0
    for flat in flats:
        _read_file(flat, room[start : start + flat.nbytes])
        start += flat.nbytes


def _read_file(flat: FlatWeight, room: object) -> None:
    assert flat.path is not None
    try:
        with open(flat.path, "rb", buffering=0) as file:
            file.seek(flat.start)
            view, done = memoryview(room), 0  # type: ignore[arg-type]
            while done < flat.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise StorageError(f"{flat.path} is shorter than it was", "remove the folder, and run again")
                done += count
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{flat.path} cannot be read: {reason}", "check the drive of --offload base=disk") from None
