"""The head that reads its weight as it lies: the same logits, the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qrosa.base.load import load_base
from qrosa.ops.few_rows_head import OutputHead
from tests.conftest import TINY_FAMILIES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3), (1, 40), (0, 1)])
def test_logits_of_a_plain_layer(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(72, 130, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(*shape, 72).to(dtype)
    got, expected = OutputHead.of(plain)(x), plain(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    exact = nn.functional.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    # A product and a bias, each rounded, and an fp32 sum of 72 terms; all of size 1.
    bound = torch.finfo(dtype).eps * (1 + exact.abs()) + 72 * 2.0**-24
    assert ((got - exact).abs() <= bound).all()


def test_gradients_pass() -> None:
    plain = nn.Linear(16, 20, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 16).bfloat16().requires_grad_()
    OutputHead.of(plain)(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.sum(0)[None], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_loaded_model_has_it_under_the_same_names(tiny_model_dir: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = load_base(str(tiny_model_dir(family)))
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, OutputHead) and not head.training
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied
    names = {name for name, module in dense.named_modules() if module is dense.get_output_embeddings()}
    assert {name for name, module in model.named_modules() if module is head} == names
    assert not any(parameter.is_meta for parameter in head.parameters())
