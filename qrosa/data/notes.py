"""What a data set holds and training does not use, counted while rows are read and told before training starts.

One rule for columns, message keys, files, rows and turns: what is passed over has a name, a number, a reason and a
first place to look at. What would change the meaning of the data is not noted here but refused where it is met.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Note:
    """One thing that is not used as it stands in the data.

    Attributes:
        what: Its name: ``column 'id'``, ``rows cut to --seq-len 128``.
        count: How many there are.
        unit: Of what: ``rows``, ``messages``, ``turns``, ``files``, ``tokens``.
        why: The reason, in words.
        first: The first place, such as ``rows.jsonl:12``.
    """

    what: str
    count: int
    unit: str
    why: str
    first: str

    @property
    def line(self) -> str:
        """The note as one line of text."""
        unit = self.unit.removesuffix("s") if self.count == 1 else self.unit
        return f"{self.what}: {self.count:,} {unit}, {self.why} (first: {self.first})"


class Notes:
    """Collects notes; equal names with equal reasons are counted together, in the order of their first place."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Note] = {}

    def add(self, what: str, why: str, where: str, *, count: int = 1, unit: str = "rows") -> None:
        """Count one more, or ``count`` more."""
        key = (what, unit, why)
        known = self._found.get(key)
        self._found[key] = Note(what, count, unit, why, where) if known is None else _more(known, count)

    def all(self) -> tuple[Note, ...]:
        """Everything noted so far."""
        return tuple(self._found.values())


def _more(note: Note, count: int) -> Note:
    return replace(note, count=note.count + count)


def block(notes: Iterable[Note]) -> list[str]:
    """The notes as lines for people."""
    return [f"  {note.line}" for note in notes]
