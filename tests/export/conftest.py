"""An adapter with every kind of part, on a tiny base, as a run leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qrosa
from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.adapter_io import save_adapter
from qrosa.base.load import load_base
from qrosa.sparse.csr import CsrDelta

MakeAdapter = Callable[..., tuple[Any, Path]]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """``model, folder = make_adapter(base)``: a model with an adapter that changes its output, saved in a run folder.

    Ranks differ by module (3, 2, 1, 0, 3, ...), and one layer in two has a sparse part unless ``sparse=False``.
    """

    def make(
        base: Path, *, sparse: bool = True, low_rank: bool = True, size: float = 0.1, name: str = "run"
    ) -> tuple[Any, Path]:
        model, _ = load_base(str(base))
        generator = torch.Generator().manual_seed(11)
        layers = quantized_linears(model)
        if low_rank:
            inject_low_rank(model, {path: (3, 2, 1, 0)[index % 4] for index, path in enumerate(layers)}, alpha=4.0)
        for index, layer in enumerate(layers.values()):
            if layer.low_rank is not None:
                b = layer.low_rank.B
                b.data = (torch.randn(b.shape, generator=generator) * size).bfloat16()
            if sparse and index % 2 == 0:
                rows, columns = layer.weight.shape
                positions = torch.randperm(rows * columns, generator=generator)[:50].sort().values
                values = torch.randn(50, generator=generator) * size
                layer.set_sparse(CsrDelta.from_positions(positions, layer.weight.shape, values))
        model.qrosa_adapter = qrosa.AdapterConfig(rank=3, density=0.01, alpha=4.0, dropout=0.1)
        save_adapter(model, tmp_path / name / "adapter")
        return model, tmp_path / name

    return make
