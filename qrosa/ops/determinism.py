"""The same bits every time: torch's strict determinism, for a stretch of work; attention by the kernels planned for.

On a card fused attention's backward pass sums in any order unless determinism is *strict*: told to warn only, torch
takes the other kernel (``aten/src/ATen/native/transformers/cuda/attention_backward.cu``). Strict determinism in turn
refuses cuBLAS until its workspace has a fixed size, which has to be said before its first call. Fresh tensors are not
filled: that is for finding bugs.

Strict determinism also keeps cuDNN's attention out, which torch otherwise prefers on some cards (Hopper, Blackwell).
It is kept out without determinism, too: it makes a plan of its own for each new batch and length, which rows of many
lengths always are, and memory is planned for flash and memory-efficient attention.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

_fill: Any = torch.utils.deterministic  # its setting is a property that type checkers do not see
WORKSPACE_SETTING, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def fix_workspace() -> bool:
    """Give cuBLAS the workspace that strict determinism asks for; False where it has run before and it is too late."""
    if torch.cuda.is_initialized() and WORKSPACE_SETTING not in os.environ:
        return False
    os.environ.setdefault(WORKSPACE_SETTING, WORKSPACE)
    return True


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """While inside, equal inputs give equal bits on one machine; what was set before comes back.

    Args:
        on: False leaves that out, for those who want the speed. Without a card nothing has to be changed.
    """
    if not torch.cuda.is_available():
        yield
        return
    with _without_cudnn_attention():
        if on:
            with _strict():
                yield
        else:
            yield


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _strict() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _fill.fill_uninitialized_memory
    strict = fix_workspace()
    if not strict:
        warnings.warn(
            "qrosa: this process used the card before qrosa did, so equal runs may differ in their last bits; to "
            f"prevent it, set {WORKSPACE_SETTING}={WORKSPACE} before it starts",
            stacklevel=5,  # of the with statement, past two contexts
        )
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    _fill.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _fill.fill_uninitialized_memory = filled
