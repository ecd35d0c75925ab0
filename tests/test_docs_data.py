"""docs/data.md: its commands are taken, its rows do what it says, its flags and figures are those of the code."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from qrosa.cli.main import cli
from qrosa.config import DataConfig
from qrosa.data import rendering
from qrosa.data.columns import Columns
from qrosa.data.compressed import PACKED_SUFFIXES
from qrosa.data.encode import Encoder
from qrosa.data.files import SUFFIXES
from qrosa.data.formats import RawRow
from qrosa.data.notes import Notes
from qrosa.data.store import Rows
from qrosa.errors import InputError

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (qrosa .+)$", PAGE, re.MULTILINE)


def rows_of(section: str, column: int = 1) -> list[dict[str, Any]]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    before = r"\|[^|]+" * (column - 1)
    return [json.loads(row) for row in re.findall(rf"^{before}\| `(\{{.+?\}})` \|", text, re.MULTILINE)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_taken(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_every_setting_of_data_is_shown() -> None:
    shown = {word for line in COMMANDS for word in shlex.split(line) if word.startswith("--")}
    assert {"--" + field.name.replace("_", "-") for field in dataclasses.fields(DataConfig)} <= shown


def test_every_suffix_is_named() -> None:
    named = set(re.findall(r"`(\.\w+)`", PAGE.split("## Kinds of rows")[0]))
    assert {*SUFFIXES, *PACKED_SUFFIXES} == named


def test_every_kind_of_row_is_shown_and_learnt_as_said(tiny_tokenizer: Any) -> None:
    rows = rows_of("Kinds of rows")
    assert [RawRow(row).kind for row in rows] == ["messages", "conversations", "alpaca", "prompt-completion", "text"]
    encoded = Encoder(tiny_tokenizer, seq_len=64).encode([RawRow(row) for row in rows])
    learnt = {tiny_tokenizer.decode([token for token in row.labels if token >= 0]) for row in encoded[:-1]}
    assert learnt == {"a<|im_end|>"}


def test_rows_to_compare_are_what_is_said() -> None:
    pair, judged = rows_of("Preferences", column=2)
    assert RawRow(pair, answers="pairs").kind == "preference"
    assert RawRow(judged, answers="judged").kind == "judged"


@pytest.mark.parametrize("row", rows_of("What is not used, and what is refused"))
def test_what_is_said_to_be_refused_is(row: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Columns().check(row, RawRow(row).kind, "f:1", Notes())


def test_figures() -> None:
    limits = f"{rendering.SECONDS:g} seconds of the processor and {rendering.EXTRA_BYTES >> 20} MB at most"
    assert limits in PAGE and f"may write {rendering.MOST_CHARACTERS} characters" in PAGE
    rows = Rows.of([])
    store = rows._store
    arrays = (store.starts, store.lengths, store.supervised, rows._numbers, rows.lengths, rows.supervised)
    assert f"{sum(array.itemsize for array in arrays)} bytes a row" in PAGE
