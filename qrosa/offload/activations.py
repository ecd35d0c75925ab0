"""Activation offload: what checkpointing keeps of each decoder block, kept in host memory.

Activation checkpointing keeps one hidden state [B, L, d] a block, its *boundary*. Here each boundary goes to pinned
host memory on a stream of its own as soon as its block has run, and comes back one block ahead of the backward pass.
What is recomputed is computed from the same bits, so losses and gradients equal those without offload.

It works through torch's own non-reentrant checkpoint. That keeps a block's arguments in a closure; here it is handed a
*boundary* object instead of the hidden state. The first forward pass takes the live tensor out of it, so the graph is
the usual one; the recomputation takes a copy that came back from the host, which is all it needs, since only the
tensors that it saves are used, not its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _Boundary:
    """One block's input: live, then on the host, then on its way back."""

    def __init__(self, hidden: Tensor) -> None:
        self.live: Tensor | None = hidden
        self.host: Tensor | None = None
        self.returned: Tensor | None = None
        self.arrival: torch.cuda.Event | None = None
        self.device = hidden.device
        self.requires_grad = hidden.requires_grad


class ActivationOffload:
    """A checkpoint function that keeps block inputs on the host.

    Use it as transformers' checkpointing function: ``offload.checkpoint(block, hidden, *args)``. One object serves one
    model; ``held`` is the number of boundaries on the host now.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._held: list[_Boundary] = []

    @property
    def held(self) -> int:
        """Boundaries that are on the host and have not been asked for."""
        return len(self._held)

    def checkpoint(self, block: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        """Run ``block(hidden, *args)`` and keep only ``hidden`` for its recomputation, on the host."""
        if not torch.is_grad_enabled():
            return block(hidden, *args)
        boundary = _Boundary(hidden)

        def run(*rest: Any) -> Any:
            return block(self._take(boundary), *rest)

        output = checkpoint(run, *args, use_reentrant=False)
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            self._send(boundary)
        else:
            boundary.live = None  # backward ends above this block, as it does when masks are selected
        return output

    def _take(self, boundary: _Boundary) -> Tensor:
        if boundary.live is not None:
            return boundary.live
        self._bring_back(boundary)
        if boundary.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(boundary.arrival)
        hidden, boundary.returned = boundary.returned, None
        assert hidden is not None
        if self._stream is not None:
            hidden.record_stream(torch.cuda.current_stream(self.device))
        if boundary in self._held:
            self._held.remove(boundary)
        if self._held:
            self._bring_back(self._held[-1])  # the backward pass asks for the last one kept next
        return hidden.requires_grad_(boundary.requires_grad)

    def _send(self, boundary: _Boundary) -> None:
        hidden = boundary.live
        assert hidden is not None
        host = torch.empty_like(hidden, device="cpu", pin_memory=self._stream is not None, requires_grad=False)
        if self._stream is None:
            host.copy_(hidden.detach())
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                host.copy_(hidden.detach(), non_blocking=True)
            hidden.record_stream(self._stream)
        boundary.host, boundary.live = host, None
        self._held.append(boundary)

    def _bring_back(self, boundary: _Boundary) -> None:
        if boundary.returned is not None or boundary.host is None:
            return
        if self._stream is None:
            boundary.returned = boundary.host.to(self.device, copy=True)
        else:
            with torch.cuda.stream(self._stream):
                boundary.returned = boundary.host.to(self.device, non_blocking=True)
                boundary.arrival = torch.cuda.Event()
                boundary.arrival.record(self._stream)
        boundary.host = None
