"""The documents say what is: commands exist, tables come from the result files, links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest

from bench.tables import DOCUMENTS, filled
from qrosa.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("csrc/*.md")),
    *sorted(ROOT.glob("bench/*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert filled(text) == text, "run python bench/tables.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_and_flag_exists(path: Path) -> None:
    for line in re.findall(r"(?=qrosa (\w+)((?: [^`\n|]*)?))", path.read_text(encoding="utf-8")):
        name, rest = line[0], line[1].split(" qrosa ")[0]
        if name not in COMMANDS:
            continue
        module = COMMANDS[name][0]
        command: click.Command = importlib.import_module(module.split(":")[0]).command
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest):
            assert flag in known | {"--help", "--debug"}, f"qrosa {name} has no {flag}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
