"""What a card is, and whether torch computes on it: it may have no code for a card that the driver shows."""

from __future__ import annotations

from typing import Any


def card_facts(index: int) -> dict[str, Any]:
    """Name, memory (bytes) and compute capability of a card; ``fails`` is what torch says of a sum on it, or None."""
    import torch

    from qrosa.errors import first_line

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    fails = None
    try:
        torch.ones(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:  # a card that this torch has no code for
        fails = first_line(error)
    return {
        "index": index,
        "name": torch.cuda.get_device_name(index),
        "total": total,
        "free": free,
        "capability": f"{major}{minor}",
        "fails": fails,
    }
