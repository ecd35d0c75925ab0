"""Runs side by side: what differs in their settings, and what came of it.

A figure is comparable only as far as the runs share what it was measured on. Runs whose base or rows differ are
compared all the same, and that is said (``notes``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qrosa.errors import InputError
from qrosa.quantities import bytes_text
from qrosa.report.curves import number, points, smooth, window_of
from qrosa.report.runs import Evaluation, RunFigures, read_run
from qrosa.report.sheet import setting_text
from qrosa.report.words import count_text, duration_text

Row = tuple[str, ...]
_WHERE = ("output",)  # settings that say where a run lies, not what it is
_MEANS = {
    "model": ("base", "losses are of different models"),
    "train": ("rows trained on", "training losses are of different rows"),
    "heldout": ("rows held out", "held-out losses are of different rows"),
}


class Comparison:
    """Two runs or more, side by side.

    Args:
        folders: The runs.

    Attributes:
        runs: What each folder says.
        names: What to call them: their folders' names, or as they were given where two have one name.
        window: Steps that a smoothed training loss is the mean of, the same for all.

    Raises:
        InputError: Fewer than two runs, one twice, or what is no run with metrics.
        StorageError: The settings of one are damaged.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise InputError(
                f"two runs or more are compared, and {len(folders) or 'none'} is given", "qrosa compare RUN RUN"
            )
        places = [folder.absolute().resolve() for folder in folders]
        for folder, place in zip(folders, places, strict=True):
            if places.count(place) > 1:
                raise InputError(f"run {folder} is given twice", "name each run once")
        self.runs = [read_run(folder) for folder in folders]
        short = [place.name for place in places]
        self.names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
        self.window = window_of(min(len(run.steps) for run in self.runs))

    def smoothed(self, run: RunFigures, key: str) -> list[tuple[float, float]]:
        """The curve of a figure of each step, as means of ``window`` steps."""
        return smooth(points(run.steps, key), self.window)

    @property
    def settings(self) -> dict[str, list[Any]]:
        """Setting -> its value in each run, for those that differ."""
        names = [name for name in self.runs[0].settings if name not in _WHERE]
        values = {name: [run.settings[name] for run in self.runs] for name in names}
        return {name: found for name, found in values.items() if any(value != found[0] for value in found)}

    @property
    def notes(self) -> list[str]:
        """What people should know before they read a difference into the figures, a sentence each."""
        notes = []
        for what, (word, so) in _MEANS.items():
            known = [run.fingerprints.get(what) for run in self.runs]
            if len({value for value in known if value is not None}) > 1:
                notes.append(f"the {word} differ: {so}" if what != "model" else f"the {word} differs: {so}")
            unknown = [name for name, value in zip(self.names, known, strict=True) if value is None]
            if unknown:
                notes.append(f"whether {', '.join(unknown)} had the same {word} as the others is not on record")
        if "objective" in self.settings:
            notes.append("the objectives differ: losses are of different things")
        for name, run in zip(self.names, self.runs, strict=True):
            if not run.finished:
                notes.append(f"{name} is not finished: its figures are those of its first {run.last_step} steps")
            if run.damaged:
                notes.append(f"{name}: {run.damaged} damaged lines of its logs are left out")
        return notes

    def document(self) -> dict[str, Any]:
        """What ``qrosa compare --json`` prints; bytes, seconds, fractions, None where something is not known."""
        return {
            "runs": [self._figures(name, run) for name, run in zip(self.names, self.runs, strict=True)],
            "settings": self.settings,
            "smoothed_over": self.window,
            "notes": self.notes,
        }

    def _figures(self, name: str, run: RunFigures) -> dict[str, Any]:
        return {
            "name": name,
            "run": str(run.folder),
            "finished": run.finished,
            "steps": run.last_step,
            "steps_planned": run.to_do,
            "trainable": run.trainable,
            "share": run.share,
            "eval": {"best": run.best, "last": run.last},
            "loss": {"smoothed": self.smoothed(run, "loss")[-1][1], "last": run.steps[-1]["loss"]},
            "seconds": run.seconds,
            "tokens_per_s": run.tokens_per_s,
            "memory": {"planned": run.planned, "measured": run.measured},
            "fingerprints": dict(run.fingerprints),
        }

    def rows(self) -> list[Row]:
        """The figures in words: what, then a text for each run."""
        over = f"mean of {self.window} steps" if self.window > 1 else "last step"
        rows = [
            self._row("steps", _steps),
            self._row("trainable", _trainable),
            self._row("held-out loss, best", lambda run: _evaluation(run.best)),
            self._row("held-out loss, last", lambda run: _evaluation(run.last)),
            self._row(f"training loss, {over}", lambda run: f"{self.smoothed(run, 'loss')[-1][1]:.4f}"),
            self._row("time in steps", lambda run: _known(run.seconds, duration_text)),
            self._row("tokens a second", lambda run: _known(run.tokens_per_s, count_text)),
            self._row("peak memory, planned", lambda run: _known(run.planned, _bytes)),
            self._row("peak memory, measured", lambda run: _known(run.measured, _bytes)),
        ]
        if any("accuracy" in (run.last or {}) for run in self.runs):
            rows.insert(4, self._row("answers told apart, last", lambda run: _known(_accuracy(run), "{:.1%}".format)))
        for what, (word, _) in _MEANS.items():
            found = [run.fingerprints.get(what, "unknown")[:8] for run in self.runs]
            if len(set(found)) > 1:
                rows.append((word, *found))
        return rows

    def setting_rows(self) -> list[Row]:
        """The settings that differ, in the same form."""
        return [(f"--{name.replace('_', '-')}", *map(setting_text, values)) for name, values in self.settings.items()]

    def _row(self, what: str, text: Callable[[RunFigures], str]) -> Row:
        return (what, *map(text, self.runs))


def _steps(run: RunFigures) -> str:
    if not run.finished:
        return f"{run.last_step:,}, not finished"
    early = run.to_do is not None and run.last_step < run.to_do
    return f"{run.last_step:,} of {run.to_do:,.0f}, stopped early" if early else f"{run.last_step:,}"


def _trainable(run: RunFigures) -> str:
    share = f" ({run.share:.2%})" if run.share is not None else ""
    return _known(run.trainable, lambda value: f"{value:,.0f}") + share


def _evaluation(found: Evaluation | None) -> str:
    return "none" if found is None else f"{found['loss']:.4f} (step {found['step']:,})"


def _accuracy(run: RunFigures) -> float | None:
    return number((run.last or {}).get("accuracy"))


def _known(value: float | None, form: Callable[[float], str]) -> str:
    return "unknown" if value is None else form(value)


def _bytes(value: float) -> str:
    return bytes_text(int(value))
