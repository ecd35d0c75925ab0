"""`qrosa generate`: one answer, JSON, and a chat over stdin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qrosa.cli.main import cli


def _run(*args: object, text: str | None = None) -> Any:
    return CliRunner().invoke(cli, ["generate", *map(str, args)], input=text)


def test_streamed_text_is_the_json_text(tiny_model_dir: Callable[..., Path]) -> None:
    args = (tiny_model_dir(), "--prompt", "the film was", "--max-new-tokens", 8)
    document = json.loads(_run(*args, "--json").stdout)
    assert {"prompt", "text", "tokens", "prompt_tokens", "finished", "seconds", "tokens_per_s"} == set(document)
    assert 1 <= document["tokens"] <= 8
    done = _run(*args)
    assert done.exit_code == 0 and done.stdout.strip() == document["text"]


def test_chat_over_a_pipe(tiny_model_dir: Callable[..., Path]) -> None:
    said = "hello\n\n/reset\n/nonsense\nhello\n" + "long " * 300 + "\n/exit\nnever answered\n"
    done = _run(tiny_model_dir(), "--chat", "--max-new-tokens", 6, text=said)
    assert done.exit_code == 0, done.output
    answers = done.stdout.splitlines()
    half = len(answers) // 2
    assert answers and answers[:half] == answers[half:], "after /reset the same words get the same answer"
    assert "the conversation is forgotten" in done.stderr and "no such command '/nonsense'" in done.stderr
    assert "the model takes 256" in done.stderr and "hint: " in done.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        ((), "nothing to answer"),
        (("--prompt", ""), "nothing to answer"),
        (("--prompt", "x", "--chat"), "contradict"),
        (("--chat", "--json"), "one JSON document"),
        (("--chat", "--raw"), "--raw"),
        (("--prompt", "x", "--temperature", "-1"), "--temperature"),
        (("--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "x", "--raw", "--system", "s"), "needs a chat template"),
        (("--prompt", "x " * 400), "the model takes 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(args: tuple[str, ...], words: str, tiny_model_dir: Callable[..., Path]) -> None:
    done = _run(tiny_model_dir(), *args)
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and words in done.stderr and done.stderr.count("hint: ") == 1
