"""A stderr that never fails: work does not depend on who watches it.

The reader of a pipe may leave (``| head``, a lost connection), the disk that a log goes to may fill up. What is said
then goes nowhere; rich, for one, would end the program.
"""

from __future__ import annotations

from typing import IO, Any


class NeverFails:
    """A text stream whose writes are lost, without a word, where the stream behind it cannot take them.

    Args:
        stream: The stream; everything else that is asked of this object is asked of it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if it can be done."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # gone or full; closed
            pass
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be done."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
