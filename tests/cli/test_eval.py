"""`qrosa eval` end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qrosa.cli.main import cli
from tests.export.conftest import MakeAdapter, make_adapter

__all__ = ["make_adapter"]


def _run(*args: object) -> Any:
    return CliRunner().invoke(cli, ["eval", *map(str, args)])


def test_json_of_a_model_and_of_a_run(
    tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path], make_adapter: MakeAdapter
) -> None:
    _, run = make_adapter(tiny_model_dir())
    documents = []
    for source in (tiny_model_dir(), run):
        done = _run(source, "--data", tiny_rows(), "--json")
        assert done.exit_code == 0, done.output
        documents.append(json.loads(done.stdout))
    for document in documents:
        assert document["rows"] == 16 and document["supervised_tokens"] >= 32
        assert 0 <= document["accuracy"] <= 1 and 0 <= document["exact_match"] <= 1
    assert documents[0]["loss"] != documents[1]["loss"]


def test_accuracy_is_null_without_labels(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path]) -> None:
    rows = tiny_rows([{"text": f"the film was good {index}"} for index in range(4)])
    document = json.loads(_run(tiny_model_dir(), "--data", rows, "--json").stdout)
    assert document["accuracy"] is None and document["exact_match"] is None and document["perplexity"] > 1


def test_table_limit_and_notes(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path]) -> None:
    done = _run(tiny_model_dir(), "--data", tiny_rows(), "--limit", 4)
    assert done.exit_code == 0 and "accuracy" in done.stdout and "%" in done.stdout
    long = tiny_rows([{"prompt": "good", "completion": " bad " * 60}])
    done = _run(tiny_model_dir(), "--data", long, "--seq-len", 40)
    assert "rows cut: 1 row, they are longer than --seq-len 40" in done.stderr


PAIRS = [
    {"prompt": f"the film was {word}", "chosen": " good", "rejected": " bad story"} for word in ("good", "bad", "quick")
]


def test_preferences(
    tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path], make_adapter: MakeAdapter
) -> None:
    """The margin is the rows' own: swapped answers turn its sign, and beta only scales the loss."""
    _, run = make_adapter(tiny_model_dir())
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    ask = ("--objective", "dpo", "--json")
    one, other = (json.loads(_run(run, "--data", tiny_rows(rows), *ask).stdout) for rows in (PAIRS, swapped))
    assert one["rows"] == 3 and one["margin"] != 0
    assert other["margin"] == pytest.approx(-one["margin"], rel=1e-6)
    assert one["accuracy"] + other["accuracy"] == 1
    flat = json.loads(_run(run, "--data", tiny_rows(PAIRS), *ask, "--beta", "1e-9").stdout)
    assert flat["loss"] == pytest.approx(0.6931, abs=1e-4) and flat["margin"] == one["margin"]
    table = _run(run, "--data", tiny_rows(PAIRS), "--objective", "dpo")
    assert "margin" in table.stdout and "%" in table.stdout


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("no-such-folder/x", "--data", "ROWS"), 2, "no-such-folder/x"),
        (("MODEL", "--data", "missing.jsonl"), 2, "missing.jsonl"),
        (("MODEL",), 2, "--data"),
        (("MODEL", "--data", "ROWS", "--objective", "dpo"), 2, "has no adapter"),
        (("MODEL", "--data", "ROWS", "--objective", "ppo"), 2, "ppo"),
        (("MODEL", "--data", "ROWS", "--device", "tpu"), 2, "--device"),
        (("MODEL", "--data", "ROWS", "--device", "cuda:77"), 2, "is not here"),
        (("MODEL", "--data", "ROWS", "--seq-len", "abc"), 2, "--seq-len"),
    ],
    ids=["model", "rows", "no rows", "base alone", "objective", "device", "card", "seq-len"],
)
def test_bad_input(
    args: tuple[str, ...],
    code: int,
    words: str,
    tiny_model_dir: Callable[..., Path],
    tiny_rows: Callable[..., Path],
) -> None:
    named = {"MODEL": str(tiny_model_dir()), "ROWS": str(tiny_rows())}
    done = _run(*(named.get(arg, arg) for arg in args), "--json")
    assert done.exit_code == code, done.output
    assert done.stdout == "" and words in done.stderr
    assert done.stderr.count("error: ") == 1 and done.stderr.count("hint: ") == 1
