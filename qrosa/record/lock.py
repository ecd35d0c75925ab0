"""One writer a run folder: a lock that the system lets go of when its holder ends, however it ends.

The lock is an advisory ``flock`` on ``.lock`` in the folder. The file holds the id of the process, for the message that
refuses the next one, and is removed with the lock; one that a killed process leaves behind locks nothing. File systems
that have no such locks (some network ones) grant every request.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from qrosa.errors import InputError
from qrosa.files import write_fault

LOCK_FILE = ".lock"


class RunLock:
    """The right to write into a run folder; a context that gives it back.

    Args:
        folder: The run folder; it must exist by the time the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; nothing happens where it is held already by this object.

        Raises:
            InputError: Another process has it.
            StorageError: The folder cannot be written.
        """
        path = self.folder / LOCK_FILE
        while self._descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise write_fault(path, error) from None
            if not _locked(descriptor):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise _busy(self.folder, holder)
            if not _is(path, descriptor):  # its holder removed the file between the two calls: this one is no door
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._descriptor is not None:
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def check_unlocked(folder: Path) -> None:
    """Refuse a folder that another process writes to; changes nothing on disk.

    Raises:
        InputError: The folder is in use.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # no lock there, or none that could be held: what cannot be written is found out by who writes
    try:
        if not _locked(descriptor):
            raise _busy(folder, _holder(descriptor))
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks on this file system
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 20, 0).decode("ascii", "replace")
    return f"process {text}" if text.isdigit() else "another process"


def _busy(folder: Path, holder: str) -> InputError:
    return InputError(
        f"run {folder} is in use by {holder}",
        "wait until it has ended, or give another --output; start the processes of one run with torchrun",
    )
