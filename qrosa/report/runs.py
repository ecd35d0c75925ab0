"""A run as its folder tells it, finished or not: what ``qrosa compare`` sets side by side.

Read from the files alone; no weight is touched. A finished run's figures are those of its ``report.json``; one that is
still going on, or was stopped, has them from its logs, its plan and its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.config import make_run_config, read_yaml, to_flat
from qrosa.errors import InputError, QrosaError, StorageError
from qrosa.files import read_json
from qrosa.record.checkpoint import stored_fingerprints
from qrosa.record.folder import CONFIG_FILE, PLAN_FILE, REPORT_JSON
from qrosa.record.logs import EVAL_FILE, METRICS_FILE, read_log
from qrosa.report.curves import number, points, steps_of

Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class RunFigures:
    """What a run folder says of its run.

    Attributes:
        folder: As it was named.
        settings: Flat settings, those that the folder does not hold at their defaults.
        finished: Whether it ran to its end.
        to_do: Steps that it was to do, those included that early stopping saved; None where that is not known.
        steps: Lines of the optimizer steps, in order.
        evaluations: Lines of the evaluations that have a loss, in order.
        damaged: Lines of the two logs that cannot be read.
        trainable: Trainable parameters.
        share: The same as a share of the base's.
        seconds: Time spent in steps.
        tokens_per_s: Tokens a second over all steps.
        planned: Highest bytes that the plan names, of the phases that were measured.
        measured: Highest bytes of any phase.
        fingerprints: ``model``, ``train`` and ``heldout``, as far as they are known.
    """

    folder: Path
    settings: Mapping[str, Any]
    finished: bool
    to_do: float | None
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    damaged: int
    trainable: float | None
    share: float | None
    seconds: float | None
    tokens_per_s: float | None
    planned: float | None
    measured: float | None
    fingerprints: Mapping[str, str]

    @property
    def last_step(self) -> int:
        """Steps that were done."""
        return int(self.steps[-1]["step"])

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> Evaluation | None:
        """The first of the evaluations with the lowest loss."""
        return min(self.evaluations, key=lambda line: float(line["loss"]), default=None)


def read_run(folder: Path) -> RunFigures:
    """Read a run.

    Raises:
        InputError: It is no run folder, or no step of it is on record.
        StorageError: Its settings are damaged.
    """
    settings = _settings(folder)
    metrics, lost = read_log(folder / METRICS_FILE)
    evaluations, lost_too = read_log(folder / EVAL_FILE)
    steps = [line for line in steps_of(metrics) if number(line.get("loss")) is not None]
    if not steps:
        raise InputError(
            f"{folder} has no metrics: no step of it is on record",
            "name runs of 'qrosa finetune' that have done a step",
        )
    report, plan = _read(folder / REPORT_JSON), _read(folder / PLAN_FILE)
    memory = [_numbers(report, "memory", kind) for kind in ("planned", "measured")]
    seconds, speed = _time(steps)
    fingerprints = _object(report, "fingerprints") or stored_fingerprints(folder)
    return RunFigures(
        folder=folder,
        settings=settings,
        finished=bool(report),
        to_do=_number(report, "steps_planned"),
        steps=steps,
        evaluations=[line for line in evaluations if number(line.get("loss")) is not None],
        damaged=lost + lost_too,
        trainable=_number(report, "trainable") or _number(plan, "budget", "trainable"),
        share=_number(report, "share") or _number(plan, "budget", "share"),
        seconds=_number(report, "seconds") or seconds,
        tokens_per_s=_number(report, "tokens_per_s") or speed,
        planned=max((memory[0].get(phase, 0) for phase in memory[1]), default=None) or _number(plan, "peak"),
        measured=max(memory[1].values(), default=None) or max((y for _, y in points(metrics, "memory")), default=None),
        fingerprints=_parts({name: str(value) for name, value in fingerprints.items()}),
    )


def _settings(folder: Path) -> dict[str, Any]:
    """The flat settings of a run."""
    if not (folder / CONFIG_FILE).is_file():
        what = "is not a run folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}", "name folders that 'qrosa finetune' wrote (its --output)")
    try:
        return to_flat(make_run_config({"output": str(folder)} | read_yaml(folder / CONFIG_FILE)))
    except InputError as error:
        raise StorageError(
            f"the settings of run {folder} are damaged: {error.message}",
            f"put its {CONFIG_FILE} right, or leave the run out",
        ) from None


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run; what is not there or is damaged tells nothing."""
    try:
        return read_json(path)
    except QrosaError:
        return {}


def _object(document: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object under nested keys, empty where there is none."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _number(document: Mapping[str, Any], *keys: str) -> float | None:
    return number(_object(document, *keys[:-1]).get(keys[-1]))


def _numbers(document: Mapping[str, Any], *keys: str) -> dict[str, float]:
    found = {name: number(value) for name, value in _object(document, *keys).items()}
    return {name: value for name, value in found.items() if value is not None}


def _time(steps: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Seconds of the steps, and tokens a second over all of them."""
    both = [(number(line.get("tokens")), number(line.get("tokens_per_s"))) for line in steps]
    timed = [(tokens, speed) for tokens, speed in both if tokens and speed]
    seconds = sum(tokens / speed for tokens, speed in timed)
    return (seconds, sum(tokens for tokens, _ in timed) / seconds) if seconds else (None, None)


def _parts(fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Those of the rows apart: trained on, and held out."""
    train, plus, heldout = fingerprints.get("data", "").partition("+")
    found = {"model": fingerprints.get("model", ""), "train": train, "heldout": heldout if plus else ""}
    return {name: value for name, value in found.items() if value}
