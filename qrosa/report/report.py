"""The figures of a finished run, and the files that tell them.

``report.json`` is the contract (seconds, bytes, fractions); ``report.html`` draws the same figures and the two logs;
``README.md`` is the model card of the adapter. Nothing here needs torch: all of it can be made again from the files
of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrosa.eval.objectives import OBJECTIVES
from qrosa.files import read_json, write_json, write_text
from qrosa.record.folder import CARD_FILE, CARD_MARK, REPORT_HTML, REPORT_JSON, is_own_card
from qrosa.record.logs import EVAL_FILE, METRICS_FILE, read_lines
from qrosa.report.facts import Facts
from qrosa.report.page import page
from qrosa.report.words import beside_loss, ending, loss_text


def write_report(folder: Path, facts: Facts) -> dict[str, Any]:
    """Write ``report.json``, ``report.html`` and ``README.md`` into the run.

    Returns:
        What ``report.json`` holds. A ``README.md`` that someone else wrote stays.
    """
    report = figures(facts)
    write_json(folder / REPORT_JSON, report)
    metrics, evals = read_lines(folder / METRICS_FILE), read_lines(folder / EVAL_FILE)
    write_text(folder / REPORT_HTML, page(facts, report, metrics, evals))
    if is_own_card(folder / CARD_FILE):
        write_text(folder / CARD_FILE, card(facts, report))
    return read_json(folder / REPORT_JSON)


def figures(facts: Facts) -> dict[str, Any]:
    """The contents of ``report.json``."""
    state = facts.state
    kept = state.best if facts.settings["keep_best"] and state.best else {"step": state.step}
    evaluated = kept if "loss" in kept else state.evaluation
    return {
        "steps": state.step,
        "steps_planned": facts.phases.total,
        "stopped_early": state.step < facts.phases.total,
        "adapter_step": kept["step"],
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "tokens_per_s": round(state.tokens / state.seconds, 3) if state.seconds else 0.0,
        "loss": {"first": state.first_loss, "last": state.last_loss},
        "eval": {key: value for key, value in evaluated.items() if key != "step"},
        "best": dict(state.best),
        "since_best": state.since_best,
        "memory": {
            "planned": dict(facts.planned),
            "measured": dict(state.peaks),
            **({"overhead": dict(facts.overhead)} if facts.overhead else {}),
        },
        "deterministic": facts.deterministic,
        "fingerprints": dict(facts.fingerprints),
        "machine": dict(facts.machine),
        "samples": [dict(sample) for sample in facts.samples],
        "resumed_at": state.resumed_at,
        "micro_batch_changes": state.changes,
        "micro_batch": {"rows": state.limits.rows, "tokens": state.limits.tokens},
        "packing": facts.settings.get("packing", "off"),
        "trainable": facts.trainable,
        "share": facts.trainable / facts.base["parameters"],
        "where": list(facts.where),
        "data": dict(facts.data),
    }


def card(facts: Facts, report: Mapping[str, Any]) -> str:
    """``README.md``: what the adapter is, how it was made, and how to use it."""
    settings, base = facts.settings, facts.base
    evaluation = report["eval"]
    held_out = (
        f"On {evaluation['rows']} held-out rows: loss {evaluation['loss']:.4f}, {beside_loss(evaluation)}."
        if evaluation
        else "No rows were held out, so nothing is known about rows that it was not trained on."
    )
    first, last = report["loss"]["first"], report["loss"]["last"]
    goal = OBJECTIVES[settings["objective"]]
    what = "pairs" if goal.group == 2 else "rows"
    learnt = f"| learnt | {goal.words}: {goal.name}, beta {settings['beta']:g} |\n" if goal.compares else ""
    output = settings["output"]
    ranks = [module.rank for module in facts.modules]
    low_rank = f"{sum(rank > 0 for rank in ranks)} of {len(ranks)} matrices, ranks up to {max(ranks)}"
    return f"""---
{CARD_MARK}
base_model: {base["source"]}
tags: [qrosa, lora, sparse]
---
# {Path(str(output)).name}

An adapter for `{base["source"]}`, trained with qrosa: the base stays frozen in 4 bits (NF4, double quantisation),
and {facts.trainable:,} parameters ({report["share"]:.3%} of the base's {base["parameters"]:,}) are trained, as a
low-rank and a sparse part.

| | |
|---|---|
| rows | {facts.data.get("rows", "?")} from {", ".join(f"`{source}`" for source in settings["data"])} |
{learnt}| steps | {report["steps"]} of {settings["batch_size"]} {what} ({report["tokens"]:,} tokens) |
| low-rank part | {low_rank} |
| sparse part | {sum(m.nnz for m in facts.modules):,} values, chosen by `{settings["mask_score"]}` |
| learning rates | {settings["lr"]:g} low-rank, {settings["sparse_lr"]:g} sparse, {settings["schedule"]} |
| training loss | {loss_text(first)} at the first step, {loss_text(last)} at the last |
| seed | {settings["seed"]} |

{" ".join([held_out, *(f"{told[0].upper()}{told[1:]}." for told in ending(report))])}

Where the parameters are: {"; ".join(facts.where[1:])}.

## Use

    qrosa generate {output} --prompt "..."
    qrosa export {output} --output DIR        # a model that loads in plain transformers

The adapter fits this base and no other: fingerprint `{base["fingerprint"]}`.
"""
