"""What is kept on the host changes where bytes lie, and no bit of what is learnt."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qrosa.train.run import finetune


def learnt(settings):
    from pathlib import Path

    finetune(settings)
    folder = Path(settings.output)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, load_file(folder / "adapter" / "adapter.safetensors")


@pytest.fixture
def plain(config, tmp_path):
    return learnt(config(max_steps=4, checkpointing="on", dropout=0.2, output=str(tmp_path / "plain")))


@pytest.mark.parametrize("offload", ["activations", "base", "activations,base", "base=disk:packed"])
def test_offload_changes_no_bit(config, plain, tmp_path, monkeypatch, offload):
    monkeypatch.chdir(tmp_path)
    losses, adapter = learnt(config(max_steps=4, offload=offload, dropout=0.2, output=str(tmp_path / "moved")))
    assert losses == plain[0]
    assert adapter.keys() == plain[1].keys() and any(name.endswith("sparse_values") for name in adapter)
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in adapter.items())
    assert (tmp_path / "packed").is_dir() == (offload == "base=disk:packed")
