"""Bad inputs, one a line: the exit code, what is said, and what to do about it.

Each case runs the command line in this process against one small world of files: a tiny model, rows, a finished run,
and damaged relatives of all three. Whatever is wrong, stderr ends in one ``error:`` and one ``hint:`` line, there is no
traceback, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qrosa.cli.main import cli
from qrosa.sparse.store import _seal

ROOT = Path(__file__).parent.parent
_NOBODY = 65534
_BUDGET = "--budget 5%"


def train(**changes: str | None) -> str:
    """A sound ``finetune`` command line with some options changed, added or (None) left out."""
    options: dict[str, str | None] = {
        "model": "model",
        "data": "rows.jsonl",
        "output": "new",
        "budget": "5%",
        "max-steps": "2",
        "batch-size": "2",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return "finetune " + " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)


def plan(rest: str) -> str:
    """A ``plan`` command line."""
    return f"plan --model model {rest}"


@dataclass(frozen=True)
class Case:
    """A command line, and how it must fail. ``error`` and ``hint`` are regular expressions."""

    arguments: str
    code: int
    error: str
    hint: str


USAGE = [
    Case("finetun --model model", 2, "no such command 'finetun'", "did you mean 'finetune'"),
    Case(train(bugdet="1%"), 2, "no such option --bugdet", "did you mean '--budget'"),
    Case("plan --model", 2, "option '--model' requires an argument", "--help"),
    Case(train(model=None), 2, "--model is missing", "model:"),
    Case(train(data=None), 2, "--data is missing", "data:"),
    Case(train(output=None), 2, "--output is missing", "output:"),
    Case("plan --budget 1%", 2, "--model is missing", "--model"),
    Case("eval model", 2, "missing option '--data'|--data is missing", "--data|--help"),
    Case("generate model", 2, "there is nothing to answer", "--prompt"),
]
BUDGETS = [
    Case(
        train(sparse_share="1", rank_by="sensitivity"), 2, "--rank-by sensitivity shares out", "--sparse-share below 1"
    ),
    Case(train(rank_by="size"), 2, "--rank-by 'size' is unknown", "order, sensitivity"),
    Case(train(budget="0%"), 2, "0% is not above 0%", r"0\.3%"),
    Case(train(budget="250%"), 2, "250% is not above 0% and up to 100%", r"0\.3%"),
    Case(train(budget="abc"), 2, "'abc' is neither a share nor a count", "20M"),
    Case(train(budget="-1M"), 2, "neither a share nor a count", "20M"),
    Case(train(budget="10.5"), 2, "not a whole number of parameters", "20M"),
    Case(train(budget=None), 2, "no budget given", "--budget 0.3%"),
    Case(train(budget=None, rank="0", density="0"), 2, "rank 0 with density 0 trains nothing", "--rank or --density"),
    Case(train(rank="4"), 2, "--budget and --rank contradict", "not both"),
    Case(train(budget=None, rank="5000"), 2, "rank 5000 is out of range", "4096"),
    Case(train(budget=None, rank="4", density="90%"), 2, "density 0.9 is out of range", "50%"),
    Case(train(budget=None, density="1%", sparse_per_layer="9"), 2, "contradict each other", "one of them"),
    Case(train(budget=None, sparse_per_layer="99999999"), 2, "asks for 99,999,999 sparse values", "ask for less"),
    Case(train(sparse_share="2"), 2, "--sparse-share 2 is out of range", "from 0 to 1"),
    Case(train(budget="1", sparse_share="0"), 2, "less than one rank", "raise the budget"),
]
SETTINGS = [
    Case(train(lr="-1"), 2, "--lr -1 is not above zero", "positive"),
    Case(train(lr="fast"), 2, "--lr 'fast' is not a number", "a number"),
    Case(train(sparse_lr="nan"), 2, "--sparse-lr 'nan' is not a number", "a number"),
    Case(train(batch_size="0"), 2, "--batch-size 0 is not above zero", "positive"),
    Case(train(sync_every="0"), 2, "--sync-every 0 is not above zero", "positive"),
    Case(train(sync_every="2", outer_momentum="1"), 2, "--outer-momentum 1 is out of range", "use 0"),
    Case(train(sync_every="2", outer_lr="0"), 2, "--outer-lr 0 is not above zero", "positive"),
    Case(train(sync_every="2", deepspeed="zero2"), 2, "--deepspeed shares the optimizer", "leave out one"),
    Case(train(sync_every="2", offload="auto,optimizer"), 2, "--offload optimizer shares", "leave out one"),
    Case(train(sync_every="2", base_rounding="feedback"), 2, "makes the base on one machine", "qrosa quantize"),
    Case(train(batch_size="1.5"), 2, "--batch-size '1.5' is not a whole number", "whole number"),
    Case(train(micro_batch="many"), 2, "--micro-batch 'many' is not a count", "auto"),
    Case(train(epochs="1"), 2, "--epochs and --max-steps contradict", "one of them"),
    Case(train(optimizer="sgd"), 2, "--optimizer 'sgd' is unknown", "adamw8bit"),
    Case(train(mask_score="best"), 2, "--mask-score 'best' is unknown", "squared"),
    Case(train(log_to="tensorbord"), 2, "--log-to 'tensorbord' is unknown", "tensorboard"),
    Case(train(packing="maybe"), 2, "--packing 'maybe' is unknown", "auto"),
    Case(train(packing="on", objective="dpo"), 2, "contradict each other", "--packing at auto"),
    Case(train(dropout="1"), 2, "--dropout 1 is out of range", "from 0"),
    Case(train(seq_len="1"), 2, "--seq-len 1 is too short", "2 or more"),
    Case(train(seed="-1"), 2, "--seed -1 is out of range", "from 0"),
    Case(train(eval_data="rows.jsonl", eval_split="5%"), 2, "contradict each other", "one of them"),
    Case(train(stop_after="0", eval_split="20%"), 2, "--stop-after 0 is not above zero", "positive"),
    Case(train(stop_after="2"), 2, "--stop-after reads held-out rows, and none are", "--eval-split 5%"),
    Case(train(samples="3"), 2, "--samples reads held-out rows, and none are", "--eval-split 5%"),
    Case(train(samples="-1"), 2, "--samples -1 is out of range", "0 to 100"),
    Case(train() + " --keep-best", 2, "--keep-best reads held-out rows, and none are", "--eval-data"),
    Case(train(eval_split="150%"), 2, "--eval-split 150% is not between", "5%"),
    Case(plan(f"{_BUDGET} --vram lots"), 2, "--vram 'lots' is not a size", "24GB"),
    Case(plan(f"{_BUDGET} --vram 0GB"), 2, "--vram '0GB' is not above zero", "24GB"),
]
CONFIGS = [
    Case("finetune --config absent.yaml", 2, "config file absent.yaml does not exist", "--config"),
    Case("finetune --config broken.yaml", 2, "broken.yaml is not valid YAML at line 2", "key: value"),
    Case("finetune --config list.yaml", 2, "list.yaml is not a mapping", "key: value"),
    Case("finetune --config typo.yaml", 2, "unknown key 'sparce_lr' in typo.yaml", "did you mean 'sparse_lr'"),
    Case("finetune --config types.yaml --model model --data rows.jsonl --output new", 2, "--rank", "int|whole number"),
    Case("finetune --config model", 2, "config file model is not a file", "--config"),
]
MODELS = [
    Case(train(model="absent/model"), 2, "absent/model", "folder|hub|download"),
    Case(train(model="empty"), 2, "empty has no config.json", "folder of a Hugging Face model"),
    Case(train(model="rows.jsonl"), 2, "rows.jsonl is neither a model folder nor", "config.json"),
    Case(train(model="bad-config"), 5, "bad-config/config.json is not valid JSON", "download"),
    Case(train(model="no-weights"), 2, "no-weights has no .safetensors files", "weights"),
    Case(train(model="truncated"), 5, "model.safetensors", "download|again"),
    Case(train(model="hostile-length"), 5, "model.safetensors", "download|again"),
    Case(train(model="hostile-offsets"), 5, "model.safetensors", "download|again"),
    Case(train(model="missing-tensor"), 2, "has no tensor", "download"),
    Case(train(model="conv"), 2, "GPT2LMHeadModel has no linear layers", "Llama"),
    Case(train(model="broken.gguf"), 5, "broken.gguf is not a sound GGUF file", "download"),
    Case(train(model="no-tokenizer"), 2, "no-tokenizer.*tokenizer", "tokenizer"),
    Case(
        plan("--budget 5%").replace("model model", "model bad-config"),
        5,
        "bad-config/config.json is not valid JSON",
        "download",
    ),
]
DATA = [
    Case(train(data="absent.jsonl"), 2, "absent.jsonl does not exist", "jsonl"),
    Case(train(data="empty.jsonl"), 2, "empty.jsonl.*no rows|no rows", "row"),
    Case(train(data="malformed.jsonl"), 2, "malformed.jsonl:2", "JSON|row"),
    Case(train(data="keys.jsonl"), 2, "keys.jsonl:1", "prompt"),
    Case(train(data="types.jsonl"), 2, r"types.jsonl:1: prompt\[0\] is a text", "messages"),
    Case(train(data="latin.jsonl"), 2, "latin.jsonl", "UTF-8"),
    Case(train(data="garbage.parquet"), 2, "garbage.parquet is not a sound Parquet file", "write or download"),
    Case(train(data="rows.xyz"), 2, "rows.xyz", "jsonl"),
    Case(train(seq_len="2"), 2, "none of 8 rows has a token to learn", "--seq-len"),
    Case("eval model --data empty.jsonl", 2, "no rows", "row"),
]
OUTPUTS = [
    Case(train(output="run"), 2, "run.*exists|run already", "--force|--resume"),
    Case(train(output="rows.jsonl"), 2, "rows.jsonl", "folder|--output"),
    Case(train(output="rows.jsonl/new"), 2, "rows.jsonl/new lies below a file", "--output"),
    Case("finetune --resume --output absent", 2, "absent", "--output"),
    Case(train(output="run") + " --resume --lr 0.5", 2, "lr", "same lr|--output"),
    Case("export run --output model", 2, "model.*(exists|not empty|already)", "--force|another"),
    Case("export rows.jsonl --output new", 2, "rows.jsonl", "run"),
    Case("export empty --output new", 2, "empty holds no adapter", "run"),
]
ADAPTERS = [
    Case("eval other-base --data rows.jsonl", 2, "base", "base"),
    Case("export other-base --output new", 2, "base", "base"),
    Case("eval cut-adapter --data rows.jsonl", 5, "adapter.safetensors", "copy"),
    Case("inspect cut-adapter", 5, "adapter.safetensors", "copy"),
    Case("inspect absent", 2, "absent", "run"),
    Case("inspect no-config", 2, "no-config holds no adapter", "run"),
    Case("compare run", 2, "two runs or more are compared, and 1 is given", "qrosa compare RUN RUN"),
    Case("compare run ./run", 2, "run run is given twice", "once"),
    Case("compare run absent --output new", 2, "absent does not exist", "qrosa finetune"),
    Case("compare run model", 2, "model is not a run folder", "qrosa finetune"),
    Case("export run --output new --format peft --base-only", 2, "--base-only does not go with", "leave out"),
    Case("export run --output new --dtype fp8", 2, "'fp8' is not one of 'fp16', 'bf16'", "qrosa export --help"),
]
MEMORY = [
    Case(plan(f"{_BUDGET} --vram 1MB"), 3, "needs at least .* [MG]iB of device memory; 1.0 MiB is available", "--vram"),
    Case(train(vram="1MB"), 3, "needs at least .* [MG]iB of .*memory; 1.0 MiB is available", "--vram|--host-memory"),
]
CASES = [*USAGE, *BUDGETS, *SETTINGS, *CONFIGS, *MODELS, *DATA, *OUTPUTS, *ADAPTERS, *MEMORY]


@pytest.fixture(scope="module")
def world(tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any) -> Iterator[Path]:
    """The folder that every case runs in. Not under pytest's own, which only the user who runs it may enter."""
    folder = Path(tempfile.mkdtemp(prefix="qrosa-bad-inputs-"))
    folder.chmod(0o755)
    before = Path.cwd()
    os.chdir(folder)
    shutil.copytree(tiny_model_dir("llama"), folder / "model")
    _write_rows(folder)
    _write_configs(folder)
    _write_models(folder, tiny_tokenizer)
    done = CliRunner().invoke(cli, [*train(output="run").split()])
    assert done.exit_code == 0, done.stderr
    _write_adapters(folder)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    os.chdir(before)
    shutil.rmtree(folder)


def _write_rows(folder: Path) -> None:
    row = {"prompt": "Review: the film was good\nSentiment:", "completion": " positive"}
    lines = [json.dumps(row | {"prompt": f"Review {index}: the film was good\nSentiment:"}) for index in range(8)]
    files = {
        "rows.jsonl": "\n".join(lines) + "\n",
        "rows.xyz": "\n".join(lines) + "\n",
        "empty.jsonl": "",
        "malformed.jsonl": lines[0] + '\n{"prompt": "cut off\n',
        "keys.jsonl": '{"question": "why?", "reply": "so"}\n',
        "types.jsonl": '{"prompt": ["not", "text"], "completion": 3}\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.jsonl").write_bytes(
        json.dumps(row, ensure_ascii=False).replace("good", "d\xe9j\xe0").encode("latin-1")
    )
    (folder / "garbage.parquet").write_bytes(b"PAR1 this is not parquet PAR1")


def _write_configs(folder: Path) -> None:
    files = {
        "broken.yaml": "model: model\n  data: [rows.jsonl\n",
        "list.yaml": "- model\n- data\n",
        "typo.yaml": "model: model\nsparce-lr: 1e-3\n",
        "types.yaml": "rank: [4, 8]\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_models(folder: Path, tokenizer: Any) -> None:
    from tests.conftest import save_tiny_model

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "model", folder / name))

    (folder / "empty").mkdir()
    (copy("bad-config") / "config.json").write_text('{"model_type": "llama", ', encoding="utf-8")
    (copy("no-weights") / "model.safetensors").unlink()
    for file in copy("no-tokenizer").glob("*token*"):
        file.unlink()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (copy("truncated") / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (copy("hostile-length") / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + weights[8:])
    header = json.dumps({"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 2**40]}}).encode()
    (copy("hostile-offsets") / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)
    _drop_tensor(copy("missing-tensor") / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    (folder / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    # gpt2 keeps its weights in Conv1D modules: there is no linear layer in its decoder.
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    save_tiny_model("gpt2", folder / "conv", tokenizer, **sizes)


def _drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def _write_adapters(folder: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "run" / "adapter", folder / name))

    config = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base"]["fingerprint"] = "0" * len(config["base"]["fingerprint"])
    config["sha256"] = _seal(config)  # a sound adapter, of another base
    (copy("other-base") / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    cut = copy("cut-adapter") / "adapter.safetensors"
    cut.write_bytes(cut.read_bytes()[:200])
    (copy("no-config") / "adapter_config.json").unlink()


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Give up root's power over permissions, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case.arguments)[:90])
def test_bad_input(case: Case, world: Path) -> None:
    before = _listing(world)
    done = CliRunner().invoke(cli, case.arguments.split())
    left = _listing(world)
    shutil.rmtree(world / "new", ignore_errors=True)  # whatever this case left, the next one starts clean
    check(done, case)
    assert left == before


def test_there_are_at_least_forty() -> None:
    assert len({case.arguments for case in CASES}) >= 40


def test_unwritable_output(world: Path, unprivileged: None) -> None:
    done = CliRunner().invoke(cli, train().split())
    check(done, Case("", 5, "new|qrosa-bad-inputs", "permission|writ|folder"))


def test_unreadable_rows(world: Path) -> None:
    secret = world / "secret.jsonl"
    shutil.copy(world / "rows.jsonl", secret)
    secret.chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(_NOBODY if user == 0 else user)
        done = CliRunner().invoke(cli, ["eval", "model", "--data", "secret.jsonl"])
    finally:
        os.seteuid(user)
        secret.unlink()
    check(done, Case("", 5, "secret.jsonl", "permission"))


@pytest.mark.parametrize("arguments", [train(), "export run --output new"])
def test_no_room_on_the_disk(arguments: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(total=2**30, used=2**30 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    before = _listing(world)
    check(CliRunner().invoke(cli, arguments.split()), Case(arguments, 5, "room|disk|free", "free|folder|disk"))
    assert _listing(world) == before


def test_no_room_for_the_answer() -> None:
    command = [sys.executable, "-m", "qrosa.cli.main", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == "error: no room left on the disk"


def check(done: Result, case: Case) -> None:
    """Hold a result against a case."""
    error, hint = ([*done.stderr.splitlines(), "", ""][:-2] or ["", ""])[-2:]
    said = f"exit code {done.exit_code}\n{done.stderr}"
    assert re.fullmatch(str(case.code), str(done.exit_code)), said
    assert error.startswith("error: "), said
    assert hint.startswith("hint: "), said
    assert re.search(case.error, error), said
    assert re.search(case.hint, hint), said
    assert "Traceback" not in done.stderr, said


def _listing(folder: Path) -> set[tuple[str, int]]:
    """Files by the time they were written; of folders, in which a lock may come and go, only the names."""
    return {
        (str(path.relative_to(folder)), 0 if path.is_dir() else path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }
