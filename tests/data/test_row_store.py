"""Encoded rows on disk: equal to what was put in, in any order, and gone with the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.data.store import Rows, RowWriter, row_lengths, with_supervised_tokens
from qrosa.errors import StorageError
from qrosa.files import cache_folder


@st.composite
def encoded_rows(draw: st.DrawFn) -> EncodedRow:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=30))
    labels = [token if draw(st.booleans()) else IGNORE for token in ids]
    place = st.none() | st.integers(0, len(ids))
    where = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
    return EncodedRow(
        ids, labels, draw(st.booleans()), where, draw(place), draw(place), draw(place), draw(st.integers(0, 9))
    )


@settings(deadline=None)
@given(st.lists(encoded_rows(), max_size=12))
def test_rows_come_back_as_they_were(rows: list[EncodedRow]) -> None:
    stored = Rows.of(rows)
    assert list(stored) == rows and stored == rows and len(stored) == len(rows)
    assert list(stored[::-2]) == rows[::-2]
    assert [stored[-1 - index] for index in range(len(rows))] == rows[::-1]
    assert row_lengths(stored) == row_lengths(rows)
    assert list(with_supervised_tokens(stored)) == with_supervised_tokens(rows)


def test_picked_rows_and_places_outside() -> None:
    rows = Rows.of([EncodedRow([n, n], [IGNORE, n]) for n in range(10)])
    assert [row.input_ids[0] for row in rows[2:8].pick([3, 0])] == [5, 2]
    with pytest.raises(IndexError):
        rows[10]


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QROSA_CACHE", str(tmp_path / "cache"))
    rows = Rows.of([EncodedRow([1, 2], [IGNORE, 2])])
    assert cache_folder() == tmp_path / "cache" and os.listdir(tmp_path / "cache") == []
    assert rows[0].input_ids == [1, 2]


def test_a_full_disk_is_a_storage_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RowWriter()

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(StorageError, match="No space left") as caught:
        writer.append(EncodedRow([1, 2], [IGNORE, 2]))
    assert "QROSA_CACHE" in caught.value.hint
