"""Timing on a card: CUDA events, a cold L2, medians, and the peaks that shares are taken of, measured in the same run.

Results of all parts of ``gpu.py`` meet in one JSON file a device and day; a part replaces only its own section, and
writes each row as soon as it is measured: a part that is cut off keeps what it had.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 256 << 20
"""More than the L2 of any card that is built for."""
PEAK_SIDE = 8192
"""Rows and columns of the product whose speed is the card's peak."""
HEAD_START = 5_000_000
"""Cycles that the card idles before a measurement, some 3 ms: longer than the host takes to launch what is measured."""

Measurement = tuple[dict[str, Any], Callable[[], Iterable[dict[str, Any]]]]
"""What is measured, for a row that says why it failed, and its rows."""


def failure(error: BaseException) -> dict[str, str]:
    """What a row says of a measurement that broke off."""
    return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def require_card() -> None:
    """Ends the program with one line where there is no card."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA card here: nothing was measured")


def seconds(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each candidate on the card; they take turns, each after other data was read into the L2.

    Read, not written: a cache full of lines that are still to be written back would charge that to the candidate.
    """
    cache = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.sum()
            torch.cuda._sleep(HEAD_START)  # or the card would wait for Python between the kernels of a layer
            begin.record()
            run()
            end.record()
            if turn >= warmup:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3 for name, pairs in events.items()
    }


def peaks() -> dict[str, float]:
    """What this card reaches: bytes/s of a copy (read and written), and bf16 operations/s of a large product."""
    side = PEAK_SIDE
    source = torch.zeros(8 * side * side, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    times = seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {"copy_bytes_per_s": 2 * source.numel() / times["copy"], "bf16_flops": 2 * side**3 / times["product"]}


def device_name() -> str:
    """The card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        return "unknown"


class Results:
    """One part's rows, in a file from the first on.

    Args:
        part: Name of the section.
        extra: What else the section holds.

    Attributes:
        failed: Rows that say why there is no figure.
    """

    def __init__(self, part: str, **extra: Any) -> None:
        self.part, self.extra, self.failed = part, extra, 0
        self._rows: list[dict[str, Any]] = []
        self._device = torch.cuda.get_device_name()  # asked once: a card that hangs would not answer
        self._target = RESULTS / f"{device_name()}-{time.strftime('%Y-%m-%d')}.json"
        self._write()  # what an earlier run had of this part goes

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, write the file, print the row."""
        self._rows.append(row)
        self.failed += bool(row.get("failed"))
        self._write()
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def _write(self) -> None:
        target = self._target
        record = json.loads(target.read_text()) if target.exists() else {}
        record |= {
            "device": self._device,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "date": time.strftime("%Y-%m-%d"),
        }
        record.setdefault("parts", {})[self.part] = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": _output("git", "rev-parse", "--short", "HEAD"),
            **self.extra,
            "rows": self._rows,
        }
        RESULTS.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)
