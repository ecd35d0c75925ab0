"""What recomputation may leave out: the wide product of a layer whose output only a sum reads.

Under checkpointing a decoder block runs a second time in backward, for the tensors that it saves. The last product of
most blocks, the down projection, goes into the residual sum, and a sum saves nothing: all that backward needs of that
layer is its input and drop(X) A^T. So its output is not computed again, a quarter of the block's forward arithmetic.
What was saved is the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class _Thread(threading.local):
    recomputing = False
    unread = False


_thread = _Thread()  # a card's backward, and with it the recomputation, runs in a thread of autograd's


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``context_fn`` of ``torch.utils.checkpoint``: around the forward pass, and around the recomputation."""
    return nullcontext(), _recomputing()


@contextmanager
def _recomputing() -> Iterator[None]:
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = False


def is_recomputing() -> bool:
    """Whether a block runs for what it saves only."""
    return _thread.recomputing


@contextmanager
def output_unread() -> Iterator[None]:
    """Inside, ``qrosa::linear`` saves what it always does, and its output has no meaning."""
    _thread.unread = True
    try:
        yield
    finally:
        _thread.unread = False


def is_output_unread() -> bool:
    """Whether the output of the call that runs is read by nobody."""
    return _thread.unread
