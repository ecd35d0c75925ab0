"""Adapters belong to one base, and a run loads to what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.base.adapter_io import load_run_or_model
from qrosa.errors import InputError
from tests.conftest import save_tiny_model

IDS = torch.arange(5, 25).view(1, 20)


def trained(folder: Path) -> Any:
    model, _ = qrosa.load(folder, qrosa.AdapterConfig(rank=3, alpha=6, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    return model.eval()


def test_a_saved_adapter_loads_to_the_same_logits(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = trained(tiny_model_dir())
    qrosa.save_adapter(model, tmp_path / "run" / "adapter")
    again, _, folder = load_run_or_model(str(tmp_path / "run"))
    assert folder == tmp_path / "run" / "adapter"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_an_adapter_is_refused_on_another_base(
    tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    qrosa.save_adapter(trained(tiny_model_dir()), tmp_path / "adapter")
    save_tiny_model("llama", tmp_path / "other", tiny_tokenizer, initializer_range=0.03)
    other, _ = qrosa.load(tmp_path / "other")
    with pytest.raises(InputError, match="another base"):
        qrosa.load_adapter(other, tmp_path / "adapter")


def test_a_model_without_adapter_cannot_be_saved(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = qrosa.load(tiny_model_dir())
    with pytest.raises(InputError, match="no adapter"):
        qrosa.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_bare_model_loads_too(tiny_model_dir: Callable[..., Path]) -> None:
    _, tokenizer, folder = load_run_or_model(str(tiny_model_dir()))
    assert folder is None and tokenizer.pad_token == "<|pad|>"


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="is not finished") as refused:
        load_run_or_model(str(tmp_path / "run"))
    assert f"qrosa finetune --resume --output {tmp_path / 'run'}" in refused.value.hint
