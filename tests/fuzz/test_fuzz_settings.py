"""YAML settings, data rows and a model's config.json with damage in them: read, or refused as input.

QROSA_FUZZ_SECONDS=600 python -m pytest tests/fuzz/test_fuzz_settings.py runs it for ten minutes a target.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import yaml

from qrosa.base.shape_source import read_shape
from qrosa.config import make_run_config, read_yaml, to_flat
from qrosa.data.dataset import load_rows
from qrosa.errors import QrosaError
from tests.fuzz.mutate import fuzz, mutated_bytes, mutated_json

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ROWS = [
    {"prompt": "Review: the film was good\nSentiment:", "completion": " positive"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"text": "a quick brown fox"},
]


def test_yaml(tmp_path):
    texts = [path.read_bytes() for path in RECIPES]
    documents = [yaml.safe_load(text) for text in texts]
    path = tmp_path / "recipe.yaml"

    def target(rng: random.Random) -> bool:
        which = rng.randrange(len(texts))
        if rng.random() < 0.5:
            path.write_bytes(mutated_bytes(texts[which], rng))
        else:
            changed = mutated_json(documents[which], rng)
            path.write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
        try:
            to_flat(make_run_config({"output": "run", "data": "rows.jsonl", **read_yaml(path)}))
        except QrosaError as error:
            assert len(error.message) < 1000 and error.hint
            return True
        return False

    fuzz(target)


def test_rows(tmp_path, tiny_tokenizer):
    def target(rng: random.Random) -> bool:
        row = rng.choice(ROWS)
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps(row).encode()] * rng.randint(1, 3)
        if rng.random() < 0.5:
            lines[-1] = mutated_bytes(lines[-1], rng)
        else:
            lines[-1] = json.dumps(mutated_json(row, rng)).encode("utf-8", "surrogatepass")
        path.write_bytes(b"\n".join(lines))
        try:
            rows = load_rows(str(path), tiny_tokenizer, seq_len=64)
        except QrosaError as error:
            assert len(error.message) < 1000 and error.hint
            return True
        assert all(0 <= token < 512 for row in rows.rows for token in row.input_ids)
        return False

    fuzz(target)


def test_model_configs(tmp_path, tiny_model_dir):
    sound = tiny_model_dir()
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    text = (sound / "config.json").read_bytes()

    def target(rng: random.Random) -> bool:
        if rng.random() < 0.3:
            (folder / "config.json").write_bytes(mutated_bytes(text, rng))
        else:
            changed = mutated_json(json.loads(text), rng)
            (folder / "config.json").write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
        try:
            read_shape(str(folder))
        except QrosaError as error:
            assert len(error.message) < 1000 and error.hint
            return True
        return False

    fuzz(target)
