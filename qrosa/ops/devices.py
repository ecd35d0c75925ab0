"""Which devices a compiled library serves. ``library.py`` says so once, when it has loaded one; ops only ask."""

from __future__ import annotations

import torch

_served: set[str] = set()


def serve(device_type: str) -> None:
    """Note that a compiled library for ``device_type`` is loaded."""
    _served.add(device_type)


def is_served(device: torch.device | str) -> bool:
    """Whether kernels run on ``device``, and not the composition."""
    return torch.device(device).type in _served
