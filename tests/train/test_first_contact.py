"""What a stranger meets with rows and a base as they come: losses told, ends learnt, several sources, a template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qrosa.cli.main import cli

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base(tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A base model: no template, and every config names an end that no template writes."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir(), folder)
    (folder / "chat_template.jinja").unlink()
    pad = tiny_tokenizer.pad_token_id
    for name, values in {
        "tokenizer_config.json": {"eos_token": "<|pad|>"},
        "config.json": {"eos_token_id": pad},
        "generation_config.json": {"eos_token_id": pad},
    }.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def chat(question: str, answer: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages if answer is None else [*messages, {"role": "assistant", "content": answer}]}


def qrosa(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_from_lossy_rows_to_an_export_that_stops(base: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    good = [chat("the film?", "good")] * 6
    lossy = [*good, chat("film " * 300, "a"), chat("q", "film " * 300), chat("q", None), {**chat("q", "a"), "id": 3}]
    (tmp_path / "lossy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lossy))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    run = tmp_path / "run"
    done = qrosa(
        *("finetune", "--model", base, "--output", run, "--rank", 2, "--density", 0.01, "--max-steps", 2),
        *("--data", tmp_path / "lossy.jsonl", "--data", f"{tmp_path}/more.jsonl=0.5", "--seq-len", 128),
        *("--chat-template", tmp_path / "chatml.jinja", "--json"),
    )
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert (data["read"], data["rows"], data["dropped"], data["truncated"]) == (16, 11, 2, 1)
    told = {note["what"]: (note["count"], note["first"].rpartition("/")[2]) for note in data["unused"]}
    assert told["column 'id'"] == (1, "lossy.jsonl:10") and told["answers cut off"] == (1, "lossy.jsonl:7")
    assert told["answers cut short"] == (1, "lossy.jsonl:8") and told["rows dropped"][0] == 1
    assert any(what.startswith("rows of ") and count == 3 for what, (count, _) in told.items())
    page = (run / "report.html").read_text()
    for note in data["unused"]:
        assert note["first"] in done.stderr and note["first"] in page
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert data["ends"] == [end] and json.loads((run / "report.json").read_text())["data"] == data
    check_ends(run, end, tmp_path)


def check_ends(run: Path, end: int, tmp_path: Path) -> None:
    """The learnt end stops ``generate``, and the template and it travel into an export."""
    from qrosa.base.adapter_io import load_run_or_model
    from qrosa.eval.generate import end_tokens

    model, tokenizer, _ = load_run_or_model(str(run))
    assert tokenizer.chat_template == CHATML and end in end_tokens(model, tokenizer)
    done = qrosa("generate", run, "--prompt", "the film?", "--max-new-tokens", 2, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["prompt_tokens"] > 5, done.output
    assert qrosa("export", run, "--output", tmp_path / "out").exit_code == 0
    assert end in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "x", "--model", "y"], "--model is given 2 times"),
        (["--seq-len", "64", "--seq-len", "32"], "--seq-len is given 2 times"),
        (["--chat-template", "none.jinja"], "--chat-template none.jinja does not exist"),
        (["--columns", "prompt"], "--columns 'prompt' is not a list of names"),
        ([], "the model's tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("q", "a")) + "\n")
    model = [] if "--model" in flags else ["--model", base]
    done = qrosa(
        *("finetune", *model, "--output", tmp_path / "run", "--rank", 2, "--data", tmp_path / "rows.jsonl", *flags)
    )
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not (tmp_path / "run").exists()


def test_ids_beyond_the_vocabulary_are_refused_before_the_load(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<label_{n}>" for n in range(600 - len(tokenizer))], special_tokens=True)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "<label_120>"}) + "\n")
    common = ["--data", tmp_path / "rows.jsonl"]
    for done in (
        qrosa("finetune", "--model", base, "--output", tmp_path / "run", "--rank", 2, *common),
        qrosa("eval", base, *common),
        qrosa("generate", base, "--prompt", "<label_120>", "--max-new-tokens", 1),
    ):
        assert done.exit_code == 2, done.output
        assert "token '<label_120>'" in done.stderr and "the model knows 512 tokens" in done.stderr
