"""The plan against a card: planned and measured peak of every phase, tokens/s, and what streaming the base costs.

Each case is one ``qrosa plan --probe`` in a process of its own, on a checkpoint of the real shape with random weights
(``random_checkpoint.py``), under the cap of a consumer card whatever the card has. ``over_resident`` is the speed of
a streamed base as a share of the speed of the same settings with the base on the card.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_measure import Measurement
from bench.random_checkpoint import SHAPES, write_checkpoint

PHASES = ("load", "select", "train", "eval")
LONGEST = "longest"  # the longest rows that recomputation alone allows, as the plan says


@dataclass(frozen=True)
class Case:
    """One probe.

    Attributes:
        vram: The cap.
        flags: What else is asked for.
        seq_len: Tokens of a row, or ``LONGEST``.
        resident: The case whose speed this one is compared with, if any.
    """

    name: str
    vram: str
    flags: str
    seq_len: int | str = 2048
    resident: str | None = None


_RESIDENT = Case("resident, recompute", "24GB", "--budget 0.3% --offload none --checkpointing on --micro-batch 1")
_SMALL = (
    Case("24 GB", "24GB", "--budget 0.3% --offload none"),
    Case("24 GB, longest rows", "24GB", "--budget 0.3% --offload none --checkpointing on --micro-batch 1", LONGEST),
    _RESIDENT,
    Case(
        "streamed, recompute",
        "24GB",
        "--budget 0.3% --offload base --checkpointing on --micro-batch 1",
        resident=_RESIDENT.name,
    ),
)
CASES: dict[str, tuple[Case, ...]] = {
    "llama-3.1-8b": (*_SMALL, Case("8 GB", "8GB", "--budget 0.3%", 1024)),
    "mistral-nemo-12b": _SMALL,
    "qwen2.5-32b": (Case("24 GB, streamed", "24GB", "--budget 0.3% --offload activations,base"),),
    "llama-3.1-70b": (
        Case("24 GB, streamed", "24GB", "--budget 0.1% --optimizer adamw8bit --offload activations,base"),
    ),
}


def plan(folder: Path, case: Case, seq_len: int, *flags: str) -> tuple[list[str], dict[str, Any]]:
    """A command and the document that it printed; ``failed`` in it says why there is none."""
    asked = ["plan", "--model", str(folder), "--vram", case.vram, "--seq-len", str(seq_len), "--json"]
    command = [*asked, *shlex.split(case.flags), *flags]
    result = subprocess.run(
        [sys.executable, "-m", "qrosa.cli.main", *command], capture_output=True, text=True, check=False
    )
    try:
        return ["qrosa", *command], json.loads(result.stdout)
    except json.JSONDecodeError:
        return ["qrosa", *command], {"failed": (result.stderr.strip().splitlines() or ["nothing was printed"])[0]}


def longest(folder: Path, case: Case) -> int:
    """The longest rows that fit with recomputation and without offload, as the plan's what-if rows say."""
    _, document = plan(folder, case, 2048)
    if "failed" in document:
        raise RuntimeError(document["failed"])
    rows = [row for row in document["what_if"] if row["checkpointing"] and row["offload"] == "none"]
    return int(rows[0]["longest_seq_len"])


def measure(folder: Path, case: Case) -> dict[str, Any]:
    """One row: what was planned and measured by phase, and the speed."""
    seq_len = longest(folder, case) if case.seq_len == LONGEST else int(case.seq_len)
    command, document = plan(folder, case, seq_len, "--probe")
    row: dict[str, Any] = {"case": case.name, "seq_len": seq_len, "command": shlex.join(command)}
    probe = document.get("probe")
    if probe is None:
        return row | {"failed": document.get("failed", "the plan does not fit")}
    for phase in PHASES:
        if phase in probe:
            row |= {f"{phase}_{key}": probe[phase][key] for key in ("planned", "measured", "reserved", "ratio")}
    settings = document["settings"]
    row |= {key: settings[key] for key in ("micro_batch_tokens", "checkpointing", "offload", "resident_blocks")}
    failed = probe["failed"] or (None if probe["fits"] else "took more than the cap")
    return row | {key: probe[key] for key in ("step_seconds", "tokens_per_s", "fits")} | {"failed": failed}


def compare(name: str) -> Iterator[Measurement]:
    """All cases of one model, on a checkpoint that goes when they are done."""
    with tempfile.TemporaryDirectory(prefix="qrosa-shapes-") as scratch:
        folder = write_checkpoint(Path(scratch) / name, SHAPES[name])
        speeds: dict[str, float] = {}
        for case in CASES[name]:
            yield {"case": case.name}, partial(_rows, folder, case, speeds)


def _rows(folder: Path, case: Case, speeds: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The row of a case; its speed is kept in ``speeds``, for those that are compared with it."""
    row = measure(folder, case)
    speed = row.get("tokens_per_s")
    if speed:
        speeds[case.name] = speed
    if speed and case.resident in speeds:
        row["over_resident"] = speed / speeds[case.resident]
    yield row
