"""Attention in fp32 is transformers' own, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qrosa.model.head import generating
from qrosa.model.modes import set_attention
from qrosa.ops.products import widening

IDS = torch.arange(40).view(2, 20) % 50 + 3


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 15)])
def test_families(family: str, kind: str, lengths: tuple[int, int], tiny_model_dir: Callable[..., Path]) -> None:
    if (family, kind) == ("gemma2", "sdpa"):
        pytest.skip("its scores are capped, which fused attention cannot do")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family), dtype=torch.bfloat16)
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        set_attention(model, kind)
        narrow = model(IDS, attention_mask=mask).logits[mask.bool()]
        with widening("cpu", True):
            set_attention(model, kind)
            assert model.config._attn_implementation == f"{kind}_in_fp32"
            wide = model(IDS, attention_mask=mask).logits[mask.bool()]
        exact = model.double()(IDS, attention_mask=mask).logits[mask.bool()]
    error = [float((one.double() - exact).norm() / exact.norm()) for one in (wide, narrow)]
    assert error[0] < 1.1 * error[1] < 0.05  # the rest of the model computes in bf16


def test_gradients(tiny_model_dir: Callable[..., Path]) -> None:
    gradients = []
    for wide in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.bfloat16)
        with widening("cpu", wide):
            set_attention(model, "sdpa")
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.float())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.03


def test_generation_is_fused(tiny_model_dir: Callable[..., Path]) -> None:
    """One query at a time only copies keys and values into fp32; afterwards the kind is what it was."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.bfloat16)
    with widening("cpu", True):
        set_attention(model, "sdpa")
        with generating(model):
            assert model.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "sdpa_in_fp32"
