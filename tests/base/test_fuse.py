"""Norms and gated blocks are recognised by what they do, and the model computes what transformers' own does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qrosa.base.build import meta_model
from qrosa.base.fuse import fuse_layers
from qrosa.base.load import load_base
from qrosa.ops.gate import GatedBlock, JoinedGatedBlock
from qrosa.ops.rms_norm import RMSNorm
from tests.conftest import TINY_FAMILIES

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NORMS = {  # of two layers, and the last one
    "llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gemma": 5, "gemma2": 9, "gemma3_text": 13, "phi3": 5,
    "smollm3": 5, "granite": 5, "olmo2": 9, "glm": 5,
}  # fmt: skip
GEMMA, ONCE = {"gemma", "gemma2", "gemma3_text"}, {"olmo2"}


def build(family: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A random model of transformers, and its copy with ops."""
    config = AutoConfig.for_model(family, **SIZES)
    models = []
    for fused in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager"))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    nn.init.normal_(parameter, mean=0.0 if family in GEMMA else 1.0, std=0.2)
        model.requires_grad_(False).eval()
        if fused:
            fuse_layers(model)
        models.append(model)
    return models[0], models[1]


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of some tokens, and the gradient of the embeddings."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    embeddings = cast(Any, model).get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits.float()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embeddings)
    return logits.detach(), gradient.float()


@pytest.mark.parametrize("family", NORMS)
def test_a_family_computes_what_transformers_does(family: str) -> None:
    plain, fused = build(family, torch.float32)
    norms = [module for module in fused.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == NORMS[family]
    assert {(norm.offset, norm.rounds) for norm in norms} == {
        (1.0, False) if family in GEMMA else (0.0, family not in ONCE)
    }
    blocks = [module for module in fused.modules() if isinstance(module, (GatedBlock, JoinedGatedBlock))]
    assert len(blocks) == 2 and {block.gelu for block in blocks} == {family in GEMMA}
    assert list(plain.state_dict()) == list(fused.state_dict())
    for ours, theirs in zip(outputs(fused), outputs(plain), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", NORMS)
def test_in_bf16_too(family: str) -> None:
    """Logits within the roundings of a stream of bf16: those of ours against fp32's are no further off than theirs."""
    exact = [value for value in outputs(build(family, torch.float32)[0])]
    plain, fused = build(family, torch.bfloat16)
    for ours, theirs, best in zip(outputs(fused), outputs(plain), exact, strict=True):
        assert (ours - best).norm() <= 1.2 * (theirs - best).norm() + 1e-6


def test_weights_without_data_are_recognised() -> None:
    model = meta_model(AutoConfig.for_model("qwen3", **SIZES))
    state = torch.get_rng_state()
    fuse_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    norm = cast(Any, model).model.layers[0].self_attn.q_norm
    assert isinstance(norm, RMSNorm) and norm.weight.is_meta and norm.weight.shape == (16,)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_loaded_base_has_them(tiny_model_dir: Callable[..., Path], family: str) -> None:
    model, _ = load_base(str(tiny_model_dir(family)))
    named = [path for path, module in model.named_modules() if isinstance(module, RMSNorm)]
    assert "model.norm" in named and "model.layers.1.input_layernorm" in named
    assert all(not p.requires_grad and not p.is_meta for p in model.parameters())
    assert isinstance(cast(Any, model).model.layers[0].mlp, (GatedBlock, JoinedGatedBlock))


class _Norm(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x, **more: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(16)), 1e-6, change
        self.__dict__.update(more)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * self.change(wide).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, activation: nn.Module, swapped: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.activation, self.swapped, self.scale = activation, swapped, scale

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (up, gate) if self.swapped else (gate, up)
        return self.down_proj(self.activation(gate) * up) * self.scale


class _Model(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)


def test_what_does_something_else_is_left_alone() -> None:
    """By its result alone: the same class and parts, and another multiplication, bound, order or chance."""
    others = [
        _Norm(lambda x: x * 1.01), _Norm(lambda x: x.clamp(-1, 1)), _Norm(lambda x: x - x.mean(-1, keepdim=True)),
        nn.LayerNorm(16, bias=False), _Block(nn.ReLU()), _Block(nn.GELU()), _Block(nn.SiLU(), swapped=True),
        _Block(nn.SiLU(), scale=0.9), _Block(nn.Sequential(nn.SiLU(), nn.Dropout(0.5))),
    ]  # fmt: skip
    known = [_Norm(), _Block(nn.SiLU()), _Block(nn.GELU("tanh"))]
    model = _Model(*others, *known).eval()
    fuse_layers(model)
    assert list(model.parts)[: len(others)] == others
    assert [type(part) for part in list(model.parts)[len(others) :]] == [RMSNorm, GatedBlock, GatedBlock]


def test_shared_and_watched_modules_are_left_alone() -> None:
    shared, watched = _Norm(), _Norm()
    watched.register_forward_hook(lambda module, inputs, output: None)
    model = _Model(shared, shared, watched)
    fuse_layers(model)
    assert list(model.parts) == [shared, shared, watched]
