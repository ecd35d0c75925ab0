"""Activation offload: what checkpointing keeps of each decoder block, kept in host memory.

Activation checkpointing keeps one hidden state [B, L, d] a block, its *boundary*. Here each boundary goes to pinned
host memory on a stream of its own as soon as its block has run, and comes back one block ahead of the backward pass.
What is recomputed is computed from the same bits, so losses and gradients equal those without offload.

It works through torch's own non-reentrant checkpoint. That keeps a block's arguments in a closure; here it is handed a
*boundary* object instead of the hidden state. The first forward pass takes the live tensor out of it, so the graph is
the usual one; the recomputation takes a copy that came back from the host, which is all it needs, since only the
tensors that it saves are used, not its graph.

Never are more than two boundaries on the card. On the way out, the compute stream waits for the copy of a block's
boundary when the next block is through, and then lets go of it; on the way back, boundaries take turns in two buffers.
(``record_stream`` would do without the waits, but a host that runs ahead of the card then holds many more: the
allocator reuses such memory only once the card has passed it.) The graph owns the boundaries: where a pass is broken
off, by memory that ran out, they go with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qrosa.offload.pool import pinned_like
from qrosa.ops.recompute import contexts

BUFFERS = 2


class _Pass:
    """The boundaries of a forward pass, and the room that they come back to.

    Attributes:
        held: Boundaries that are on the host and have not been asked for, the latest last.
        buffers: Flat room on the device that boundaries take turns in, made in the backward pass.
        returned: Boundaries that came back so far.
        count: Boundaries in all.
    """

    def __init__(self) -> None:
        self.held: weakref.WeakSet[_Boundary] = weakref.WeakSet()
        self.buffers: list[Tensor | None] = [None] * BUFFERS
        self.returned = self.count = 0

    def latest(self) -> _Boundary | None:
        """The boundary that the backward pass asks for next."""
        return max(self.held, key=lambda boundary: boundary.number, default=None)

    def room(self, like: Tensor, device: torch.device) -> Tensor:
        """Room for a boundary in the buffer whose turn it is."""
        turn = self.returned % BUFFERS
        self.returned += 1
        buffer = self.buffers[turn]
        if buffer is None or buffer.numel() < like.numel():
            buffer = self.buffers[turn] = torch.empty(like.numel(), dtype=like.dtype, device=device)
        return buffer[: like.numel()].view(like.shape).detach()


class _Boundary:
    """One block's input: live, then on its way out, on the host, on its way back."""

    def __init__(self, hidden: Tensor, through: _Pass) -> None:
        self.through = through
        self.number = through.count
        self.live: Tensor | None = hidden
        self.leaving: Tensor | None = None
        self.sent: torch.cuda.Event | None = None
        self.host: Tensor | None = None
        self.returned: Tensor | None = None
        self.arrival: torch.cuda.Event | None = None
        self.requires_grad = hidden.requires_grad
        through.count += 1

    def __del__(self) -> None:
        """Where a pass was broken off, its copies may still run: their memory must not be used again before."""
        for tensor, event in ((self.leaving, self.sent), (self.returned, self.arrival)):
            if tensor is not None and event is not None:
                torch.cuda.current_stream(tensor.device).wait_event(event)


class ActivationOffload:
    """A checkpoint function that keeps block inputs on the host.

    Use it as transformers' checkpointing function: ``offload.checkpoint(block, hidden, *args)``. One object serves one
    model.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pass: Callable[[], _Pass | None] = lambda: None
        self._leaving: Callable[[], _Boundary | None] = lambda: None

    @property
    def held(self) -> int:
        """Boundaries that are on the host and have not been asked for."""
        through = self._pass()
        return len(through.held) if through is not None else 0

    def checkpoint(self, block: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        """Run ``block(hidden, *args)`` and keep only ``hidden`` for its recomputation, on the host."""
        if not torch.is_grad_enabled():
            return block(hidden, *args)
        boundary = _Boundary(hidden, self._current_pass())

        def run(*rest: Any) -> Any:
            return block(self._take(boundary), *rest)

        output = checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            self._send(boundary)
        else:
            boundary.live = None  # backward ends above this block, as it does when masks are selected
        return output

    def _current_pass(self) -> _Pass:
        through = self._pass()
        if through is None:
            through = _Pass()
            self._pass = weakref.ref(through)
        return through

    def _take(self, boundary: _Boundary) -> Tensor:
        """The block's input: the live one in the forward pass, the one that came back in recomputation."""
        if boundary.live is not None:
            return boundary.live
        self._let_go()
        through = boundary.through
        self._bring_back(boundary)
        if boundary.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(boundary.arrival)
        hidden, boundary.returned = boundary.returned, None
        assert hidden is not None
        through.held.discard(boundary)
        following = through.latest()
        if following is not None:
            self._bring_back(following)
        else:
            through.buffers = [None] * BUFFERS  # what is in use lives on in the graph
        return hidden.requires_grad_(boundary.requires_grad)

    def _send(self, boundary: _Boundary) -> None:
        """Start the copy to the host, after letting go of the boundary before."""
        hidden = boundary.live
        assert hidden is not None
        self._let_go()
        if self._stream is None:
            boundary.host = torch.empty_like(hidden, device="cpu", requires_grad=False)
            boundary.host.copy_(hidden.detach())
        else:
            boundary.host = pinned_like(hidden)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                boundary.host.copy_(hidden.detach(), non_blocking=True)
            boundary.sent = self._stream.record_event()
            boundary.leaving = hidden.detach()
            self._leaving = weakref.ref(boundary)
        boundary.live = None
        boundary.through.held.add(boundary)

    def _let_go(self) -> None:
        """Free what has left, once the compute stream has waited for its copy."""
        boundary = self._leaving()
        if boundary is not None and boundary.sent is not None:
            torch.cuda.current_stream(self.device).wait_event(boundary.sent)
            boundary.leaving = None
        self._leaving = lambda: None

    def _bring_back(self, boundary: _Boundary) -> None:
        """Start the copy to a buffer, after all work on the boundary that the buffer held before."""
        host = boundary.host
        if boundary.returned is not None or host is None:
            return
        room = boundary.through.room(host, self.device)
        if self._stream is None:
            room.copy_(host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                room.copy_(host, non_blocking=True)
            boundary.arrival = self._stream.record_event()
        boundary.returned = room
        boundary.host = None
