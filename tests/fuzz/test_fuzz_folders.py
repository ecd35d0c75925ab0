"""Adapter and checkpoint folders with damaged or forged files: refused, or the same as before.

QROSA_FUZZ_SECONDS=600 python -m pytest tests/fuzz/test_fuzz_folders.py runs it for ten minutes a target.

A byte that changes anywhere must be noticed. Half of the changed JSON documents get digests that fit again, as someone
would write them who knows the format: those may be accepted where they are consistent, but fail in no other way.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import adapter_state
from qrosa.data.batching import Limits
from qrosa.errors import QrosaError
from qrosa.files import document_digest
from qrosa.record.checkpoint import check_same_run, latest, recover, save_checkpoint
from qrosa.record.state import RunState
from qrosa.sparse import store
from tests.fuzz.mutate import fuzz, mutated_bytes, mutated_json


def damage(folder: Path, rng: random.Random, seal: Any) -> bool:
    """Change a file of a folder, delete it or put another in its place; whether digests were made to fit again."""
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.randrange(10)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(rng.choice(sorted(folder.iterdir())).read_bytes()[: rng.randrange(1, 4000)])
    elif path.suffix == ".json" and kind < 7:
        document = mutated_json(json.loads(path.read_text()), rng)
        forged = rng.random() < 0.5 and isinstance(document, dict)
        if forged:
            try:
                document["sha256"] = seal(document)
            except Exception:  # not a document that could be sealed
                forged = False
        path.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
        return forged
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    return False


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """A loaded model with both parts, and the folder of its adapter."""
    model, _ = qrosa.load(str(tiny_model_dir()), qrosa.AdapterConfig(rank=2, density=0.01))
    ids = torch.arange(4, 40)[None]
    qrosa.select_masks(model, [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}])
    qrosa.save_adapter(model, tmp_path / "sound")
    return model, tmp_path


def test_adapters(adapter):
    model, base = adapter
    sound = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    alphas = {name: getattr(module, "alpha", None) for name, module in model.named_modules()}

    def target(rng: random.Random) -> bool:
        folder = base / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / "sound", folder)
        forged = damage(folder, rng, store._seal)
        try:
            qrosa.load_adapter(model, folder)
        except QrosaError:
            return True
        if not forged:
            state = adapter_state(model)
            assert state.keys() == sound.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in sound.items())
            assert alphas == {name: getattr(module, "alpha", None) for name, module in model.named_modules()}
        return False

    cases, refused = fuzz(target)
    assert refused > cases / 4


def test_checkpoints(tmp_path):
    from qrosa.files import write_json, write_tensors

    def write_adapter(folder: Path) -> None:
        write_tensors(folder / "adapter.safetensors", {"a": torch.arange(9.0)})
        write_json(folder / "adapter_config.json", {"format": "qrosa-adapter"})

    state = RunState(Limits(2, 64), 128, 32, step=5, selected_at=2, first_loss=2.0, last_loss=1.0, digests={"a": "b"})
    settings = {"lr": 1e-3, "model": "m", "log_to": [], "rank": None}
    sound = save_checkpoint(
        tmp_path / "sound",
        state,
        write_adapter=write_adapter,
        optimizer={"low_rank.master": torch.arange(9.0)},
        settings=settings,
        fingerprints={"model": "x", "data": "y"},
        logs={"metrics.jsonl": 7, "eval.jsonl": 0},
    )
    digest = document_digest

    def seal(document: dict[str, Any]) -> str:
        return digest({key: value for key, value in document.items() if key != "sha256"})

    def target(rng: random.Random) -> bool:
        run = tmp_path / "case"
        shutil.rmtree(run, ignore_errors=True)
        name = rng.choice(("step-5", "step-5", "step-5", "step-6", "step-²", "step-05", ".step-5.old", ".step-5.tmp"))
        folder = run / "checkpoints" / name
        shutil.copytree(sound, folder)
        forged = damage(folder, rng, seal)
        try:
            recover(run)
            found = latest(run, lambda _: None)
            if found is None:
                return True
            check_same_run(found, settings, {"model": "x", "data": "y"})
            found.optimizer_tensors()
        except QrosaError:
            return True
        assert found.run.step == found.step == 5
        if not forged:
            assert (found.run, found.settings) == (state, settings)
        return False

    cases, refused = fuzz(target)
    assert refused > cases / 4
