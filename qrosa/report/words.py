"""Figures of a run in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def beside_loss(result: Mapping[str, Any]) -> str:
    """What stands beside the loss: perplexity of answers, or how often those that are wanted are preferred."""
    if "perplexity" in result:
        return f"perplexity {result['perplexity']:.3f}"
    if "drift" in result:
        return f"told apart {result['accuracy']:.1%}, margin {result['margin']:.3f}, drift {result['drift']:.3f}"
    return f"chosen preferred {result['accuracy']:.1%}, margin {result['margin']:.3f}"


def stop_words(step: int, total: int, evaluations: int, best: int) -> str:
    """That and why a run stopped before its last step."""
    return (
        f"stopped after step {step} of {total}: the held-out loss has not come down in {evaluations} evaluations "
        f"since step {best}"
    )


def ending(report: Mapping[str, Any]) -> list[str]:
    """How a run ended, a sentence for each thing that is not as usual: before its last step, or on an earlier adapter.

    Args:
        report: The contents of ``report.json``.
    """
    told, steps = [], report["steps"]
    if report["stopped_early"]:
        told.append(stop_words(steps, report["steps_planned"], report["since_best"], report["best"]["step"]))
    if report["adapter_step"] != steps:
        told.append(
            f"the adapter is that of step {report['adapter_step']}, whose held-out loss, {report['best']['loss']:.4f}, "
            "was the lowest"
        )
    return told


def loss_text(value: float | None) -> str:
    """A loss, or that there is none."""
    return "none" if value is None else f"{value:.4f}"


def loss_form(value: float) -> str:
    """A loss as charts write it."""
    return f"{value:.4g}"


def count_text(value: float) -> str:
    """An amount with its thousands, or with its first digits where it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration_text(seconds: float) -> str:
    """Seconds in the two largest units that they fill."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
