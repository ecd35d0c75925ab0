"""What an evaluation on held-out rows found, in words, whatever was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def beside_loss(result: Mapping[str, Any]) -> str:
    """What stands beside the loss: perplexity of answers, or how often the chosen one of a pair is preferred."""
    if "perplexity" in result:
        return f"perplexity {result['perplexity']:.3f}"
    return f"chosen preferred {result['accuracy']:.1%}, margin {result['margin']:.3f}"
