"""A form of the low-rank part is one file and one line: two others than LoRA, made here, go all the way through.

``Tied`` makes both factors of one matrix, zero at first; ``Rescaled`` gives each row a trained length, as DoRA does
(arXiv 2402.09353). They, and the forms that there are beside LoRA, go the same way. Budget, start, training, saving,
loading, export and ``inspect`` know none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrosa.adapters import forms
from qrosa.adapters.budget import allocate
from qrosa.adapters.inject import adapter_parameters, quantized_linears, ramp_low_rank, trainable_parameters
from qrosa.adapters.linear import QRosaLinear
from qrosa.adapters.lora import Lora
from qrosa.adapters.rank_units import LinearShape, RankUnit, spend_on_ranks
from qrosa.adapters.shared import kind_of
from qrosa.base.adapter_io import attach_adapter, load_adapter, save_adapter
from qrosa.base.load import load_base
from qrosa.cli.inspect import describe_adapter
from qrosa.config import AdapterConfig
from qrosa.errors import InputError
from qrosa.export.merge import merge
from qrosa.export.peft import export_peft
from qrosa.sparse.csr import CsrDelta
from qrosa.sparse.store import read_adapter

Weight = Callable[[], Tensor]


class Tied(Lora):
    """tied [max(N, K), r]: B is its first N rows, A its first K, transposed."""

    name = "tied"

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"tied": (max(rows, columns), rank)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["tied"][1]

    def start(self, tensors: Mapping[str, Tensor], generator: torch.Generator | None, weight: Weight) -> None:
        tensors["tied"].zero_()

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return tensors["tied"][:columns].t().contiguous(), tensors["tied"][:rows]


class Rescaled(Lora):
    """LoRA, and the length of every row of the sum as a parameter of its own."""

    name = "rescaled"

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(rows, columns, rank), "length": (rows,)}

    def start(self, tensors: Mapping[str, Tensor], generator: torch.Generator | None, weight: Weight) -> None:
        super().start(tensors, generator, weight)
        tensors["length"].copy_(weight().norm(dim=1))

    def gain(self, tensors: Mapping[str, Tensor], weight: Weight) -> Tensor:
        return tensors["length"] / weight().norm(dim=1)


TIED, RESCALED = Tied(), Rescaled()
SINGLORA, SHARED = forms.FORMS["singlora"], forms.FORMS["shared"]


@pytest.fixture(autouse=True)
def more_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (TIED, RESCALED):
        monkeypatch.setitem(forms.FORMS, form.name, form)


def test_every_form_says_what_it_needs() -> None:
    for form in forms.FORMS.values():
        shapes = form.shapes(6, 10, 3)
        assert form.rank(shapes) == 3 and forms.form_of(shapes) is form
        assert forms.saved_rank(shapes) == 3 and forms.form_named(form.name) is form
    assert forms.form_of({"A"}) is None and forms.saved_rank({"A": (3, 10)}) == 0
    with pytest.raises(InputError, match="'other' is unknown") as caught:
        forms.form_named("other")
    assert "lora" in caught.value.hint


@pytest.mark.parametrize(
    ("form", "first", "next_one"),
    [(forms.LORA, 16, 16), (TIED, 10, 10), (RESCALED, 22, 16), (SINGLORA, 10, 10), (SHARED, 17, 19)],
)
def test_a_rank_costs_what_the_form_says(form: forms.LowRankForm, first: int, next_one: int) -> None:
    linear = LinearShape("a", 6, 10, 0)
    cost = RankUnit((linear,), form).cost
    assert [cost(rank) for rank in (0, 1, 2)] == [0, first, first + next_one]
    for budget in range(100):
        rank = spend_on_ranks([linear], budget, form=form)["a"]
        assert cost(rank) <= budget
        assert rank == linear.full_rank or cost(rank + 1) > budget


@pytest.mark.parametrize("form", [TIED, RESCALED], ids=lambda form: form.name)
def test_the_layer_is_its_effective_weight_and_every_tensor_learns(form: forms.LowRankForm) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(80, 48)
    bare = QRosaLinear.from_linear(dense)
    layer = QRosaLinear.from_linear(dense, mask=torch.rand(48, 80) < 0.1)
    layer.add_low_rank(4, alpha=8, form=form)
    x, upstream = torch.randn(7, 80), torch.randn(7, 48)
    torch.testing.assert_close(layer(x), bare(x), rtol=2.0**-7, atol=2.0**-7)  # bf16 lengths
    for parameter in layer.adapter_parameters().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.effective_weight(), layer.bias), rtol=1e-4, atol=1e-4)
    y.backward(upstream)
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.adapter_parameters().values())
    with torch.inference_mode(), layer.fixed():
        torch.testing.assert_close(layer(x[:1]), y[:1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [TIED, RESCALED, SINGLORA, SHARED], ids=lambda form: form.name)
def test_all_the_way_to_an_export(form: forms.LowRankForm, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, sparse_per_layer=8, low_rank=form.name)
    model, _ = load_base(str(tiny_model_dir()))
    allocation = attach_adapter(model, config)
    parameters = adapter_parameters(model)
    assert sum(p.numel() for p in parameters.low_rank) == allocation.low_rank_parameters
    for path, layer in quantized_linears(model).items():
        count = allocation.nnz[path]
        layer.set_sparse(CsrDelta.from_positions(torch.arange(count), layer.weight.shape) if count else None)
    for parameter in trainable_parameters(model):
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "adapter")
    again, _ = load_base(str(tiny_model_dir()))
    load_adapter(again, tmp_path / "adapter")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)

    document = describe_adapter(tmp_path / "adapter")
    assert document["rank"] == {"min": 2, "max": 2}
    assert document["trainable"] == sum(p.numel() for p in trainable_parameters(model))

    merge(tmp_path / "adapter", tmp_path / "merged", dtype="bf16")
    assert_exported(tmp_path / "merged", quantized_linears(model))
    with pytest.raises(InputError, match=f"does not hold a {form.name}"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", force=True)


def assert_exported(folder: Path, layers: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for path, layer in layers.items():
        assert torch.equal(state[f"{path}.weight"], layer.effective_weight(torch.bfloat16)), path


def test_an_unknown_form_is_refused_where_the_budget_is_spent() -> None:
    with pytest.raises(InputError, match="--low-rank 'nowhere' is unknown"):
        allocate(AdapterConfig(rank=1, low_rank="nowhere"), [LinearShape("a", 6, 10, 0)], 60)


def test_singlora_ties_both_factors_and_rises_to_its_scale(tiny_model_dir: Callable[..., Path]) -> None:
    model, _ = load_base(str(tiny_model_dir()))
    attach_adapter(model, AdapterConfig(rank=2, low_rank="singlora", alpha=8))
    assert [SINGLORA.ramp_steps(total) for total in (1, 5, 100, 5000)] == [1, 5, 10, 50]
    for path, layer in quantized_linears(model).items():
        part = layer.low_rank
        assert part is not None
        a, b = part.factors()
        smaller = min(layer.weight.shape)
        assert torch.equal(a[:, :smaller], b[:smaller].t()) and a.abs().sum() > 0, path
    seen = []
    for step in (0, 4, 9, 60):
        ramp_low_rank(model, 8.0, step, 100)
        seen.append({layer.low_rank.scale for layer in quantized_linears(model).values() if layer.low_rank})
    assert seen == [{0.4}, {2.0}, {4.0}, {4.0}]


def test_a_shared_basis_is_one_parameter_in_memory_and_in_the_file(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = load_base(str(tiny_model_dir()))
    allocation = attach_adapter(model, AdapterConfig(budget="2%", sparse_share=0, low_rank="shared"))
    layers = quantized_linears(model)
    kinds = {kind_of(path) for path in layers}
    assert len(kinds) < len(layers)
    low_rank = adapter_parameters(model).low_rank
    assert len(low_rank) == len(layers) + 2 * len(kinds)
    assert sum(p.numel() for p in low_rank) == allocation.low_rank_parameters
    for kind in kinds:
        same = [path for path in layers if kind_of(path) == kind]
        assert len({allocation.ranks[path] for path in same}) == 1
        assert len({id(layers[path].low_rank.basis_A) for path in same}) == 1
    model.train()
    ids = torch.arange(12).view(1, 12)
    for parameter in low_rank:
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in low_rank)
    save_adapter(model, tmp_path)
    assert len(read_adapter(tmp_path)[0]) == len(low_rank)
    again, _ = load_base(str(tiny_model_dir()))
    load_adapter(again, tmp_path)
    assert len(adapter_parameters(again).low_rank) == len(low_rank)


def test_a_basis_costs_once_and_a_core_for_each() -> None:
    linears = [LinearShape(f"layers.{layer}.q_proj", 6, 10, layer) for layer in range(4)]
    linears += [LinearShape(f"layers.{layer}.o_proj", 10, 6, layer) for layer in range(4)]
    linears += [LinearShape("layers.4.q_proj", 12, 10, 4)]  # of another shape: a kind of its own
    cost = {"q": lambda rank: 16 * rank + 4 * rank**2, "wide": lambda rank: 22 * rank + rank**2}
    for budget in range(400):
        ranks = spend_on_ranks(linears, budget, form=SHARED)
        q, o, wide = ranks["layers.0.q_proj"], ranks["layers.0.o_proj"], ranks["layers.4.q_proj"]
        assert set(ranks.values()) == {q, o, wide} and ranks["layers.3.o_proj"] == o
        spent = cost["q"](q) + cost["q"](o) + cost["wide"](wide)
        assert spent <= budget
        for name, rank, full in (("q", q, 6), ("q", o, 6), ("wide", wide, 10)):
            assert rank == full or spent + cost[name](rank + 1) - cost[name](rank) > budget


@pytest.mark.parametrize("form", ["singlora", "shared"])
def test_only_two_free_matrices_can_start_at_an_error(form: str) -> None:
    with pytest.raises(InputError, match=f"--low-rank {form} cannot start at the error"):
        allocate(AdapterConfig(rank=1, low_rank=form, low_rank_init="svd"), [LinearShape("a", 6, 10, 0)], 60)
    tensor = torch.zeros(2, 2)
    with pytest.raises(InputError, match="cannot start at any product"):
        forms.FORMS[form].start_at({}, tensor, tensor)
