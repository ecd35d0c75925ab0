"""Layers are found by place, adapters go in and out of a model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qrosa.adapters import inject
from qrosa.base.load import load_base
from qrosa.errors import InputError
from qrosa.sparse.csr import CsrDelta


class Decoder(nn.Module):
    """Blocks in a stack, and a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))])
        self.head = nn.Linear(16, 8)


def test_targets_are_the_linear_layers_inside_the_stack() -> None:
    assert list(inject.target_linears(Decoder())) == ["blocks.0.0", "blocks.0.2"]


def test_a_model_without_targets_is_refused() -> None:
    with pytest.raises(InputError, match="no linear layers"):
        inject.target_linears(nn.Sequential(nn.Linear(4, 4)))


def adapted(folder: Path) -> nn.Module:
    model, _ = load_base(str(folder))
    layers = inject.quantized_linears(model)
    inject.inject_low_rank(model, dict.fromkeys(layers, 2) | {next(iter(layers)): 0}, alpha=4, dropout=0.1, seed=5)
    last = next(reversed(layers.values()))
    last.set_sparse(
        CsrDelta.from_positions(torch.tensor([0, 5, 77]), last.weight.shape, torch.tensor([1.0, -2.0, 3.0]))
    )
    return model


def test_state_goes_out_and_in(tiny_model_dir: Callable[..., Path]) -> None:
    source = adapted(tiny_model_dir())
    state = inject.adapter_state(source)
    target, _ = load_base(str(tiny_model_dir()))
    inject.load_adapter_state(target, state, 4.0, dropout=0.1)
    again = inject.adapter_state(target)
    assert list(state) == list(again) and all(torch.equal(state[name], again[name]) for name in state)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(source.eval()(ids).logits, target.eval()(ids).logits)


def test_initial_values_depend_on_the_seed_alone(tiny_model_dir: Callable[..., Path]) -> None:
    first, second = adapted(tiny_model_dir()), adapted(tiny_model_dir())
    assert all(
        torch.equal(a, b)
        for a, b in zip(inject.trainable_parameters(first), inject.trainable_parameters(second), strict=True)
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update({"model.nowhere.low_rank_A": torch.zeros(2, 2)}),
        lambda state: state.pop(next(name for name in state if name.endswith("low_rank_B"))),
        lambda state: state.pop(next(name for name in state if name.endswith("sparse_col"))),
        lambda state: state.update({n: t[:, :-1] for n, t in state.items() if n.endswith("low_rank_A")}),
        lambda state: state.update({n: t + 1 for n, t in state.items() if n.endswith("sparse_row_ptr")}),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(tiny_model_dir: Callable[..., Path], damage: object) -> None:
    model = adapted(tiny_model_dir())
    before = inject.adapter_state(model)
    state = dict(before)
    damage(state)  # type: ignore[operator]
    with pytest.raises(InputError):
        inject.load_adapter_state(model, state, 4.0)
    after = inject.adapter_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
