"""A form of the low-rank part is one file and one line: two others than LoRA, made here, go all the way through.

``Tied`` makes both factors of one matrix, as SingLoRA does (arXiv 2507.05566, without its ramp); ``Rescaled`` gives
each row a trained length, as DoRA does (arXiv 2402.09353). Budget, start, training, saving, loading, export and
``inspect`` know neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrosa.adapters import forms
from qrosa.adapters.budget import LinearShape, allocate, spend_on_ranks
from qrosa.adapters.inject import adapter_parameters, quantized_linears, trainable_parameters
from qrosa.adapters.linear import QRosaLinear
from qrosa.adapters.lora import Lora
from qrosa.base.adapter_io import attach_adapter, load_adapter, save_adapter
from qrosa.base.load import load_base
from qrosa.cli.inspect import describe_adapter
from qrosa.config import AdapterConfig
from qrosa.errors import InputError
from qrosa.export.merge import merge
from qrosa.export.peft import export_peft
from qrosa.sparse.csr import CsrDelta

Weight = Callable[[], Tensor]


class Tied(Lora):
    """U [max(N, K), r]: B is its first N rows, A its first K, transposed."""

    name = "tied"

    def shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"U": (max(rows, columns), rank)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["U"][1]

    def start(self, tensors: Mapping[str, Tensor], generator: torch.Generator | None, weight: Weight) -> None:
        tensors["U"].zero_()

    def factors(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return tensors["U"][:columns].t().contiguous(), tensors["U"][:rows]


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


@pytest.mark.parametrize(("form", "first", "next_one"), [(forms.LORA, 16, 16), (TIED, 10, 10), (RESCALED, 22, 16)])
def test_a_rank_costs_what_the_form_says(form: forms.LowRankForm, first: int, next_one: int) -> None:
    linear = LinearShape("a", 6, 10, 0)
    assert [linear.cost(rank, form) for rank in (0, 1, 2)] == [0, first, first + next_one]
    for budget in range(100):
        rank = spend_on_ranks([linear], budget, form=form)["a"]
        assert linear.cost(rank, form) <= budget
        assert rank == linear.full_rank or linear.cost(rank + 1, form) > budget


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


@pytest.mark.parametrize("form", [TIED, RESCALED], ids=lambda form: form.name)
def test_all_the_way_to_an_export(form: forms.LowRankForm, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, sparse_per_layer=8, low_rank=form.name)
    model, _ = load_base(str(tiny_model_dir()))
    allocation = attach_adapter(model, config)
    parameters = adapter_parameters(model)
    assert sum(p.numel() for p in parameters.low_rank) == allocation.low_rank_parameters
    for path, layer in quantized_linears(model).items():
        count = allocation.nnz[path]
        layer.set_sparse(CsrDelta.from_positions(torch.arange(count), layer.weight.shape) if count else None)
        for parameter in layer.adapter_parameters().values():
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
