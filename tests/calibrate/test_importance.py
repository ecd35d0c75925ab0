"""What a token counts against gradients taken plainly, and the moments that it weighs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.base.load import load_base
from qrosa.calibrate.importance import shared_inputs, token_importance
from qrosa.quant.hessian import InputMoments

IDS = torch.randint(0, 460, (6, 12), generator=torch.Generator().manual_seed(5))


def plainly(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Squared gradients of each layer's output, with every activation kept: two windows at a time."""
    layers, found = quantized_linears(model), {}
    kept: dict[str, list[Tensor]] = {path: [] for path in layers}
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def keep(path: str, y: Tensor) -> Tensor:
        y = y.detach().requires_grad_() if not y.requires_grad else y
        y.retain_grad()
        kept[path].append(y)
        return y

    handles = [layer.register_forward_hook(lambda _, __, y, path=path: keep(path, y)) for path, layer in layers.items()]
    torch.manual_seed(seed)
    for part in IDS.split(2):
        logits = model(input_ids=part, use_cache=False).logits.float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for path, outputs in kept.items():
        found[path] = torch.cat([y.grad.float().square().sum(-1) for y in outputs if y.grad is not None])
    return found


def test_is_the_squared_gradient_of_the_outputs_that_share_an_input(tiny_model_dir: Any) -> None:
    model, _ = load_base(str(tiny_model_dir("llama")), dtype=torch.float32)
    found = token_importance(model, IDS, 7)
    expected = plainly(load_base(str(tiny_model_dir("llama")), dtype=torch.float32)[0], 7)
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)):
        paths = [f"model.layers.0.{name}" for name in group]
        squares = torch.stack([expected[path] for path in paths]).sum(0)
        for path in paths:
            torch.testing.assert_close(found[path], squares / squares.mean(), rtol=1e-3, atol=1e-4)
    assert found.keys() == quantized_linears(model).keys()


def test_leaves_the_model_and_the_dice_alone(tiny_model_dir: Any) -> None:
    model, _ = load_base(str(tiny_model_dir("llama")), dtype=torch.float32)
    dice = torch.get_rng_state()
    first, again = token_importance(model, IDS, 7), token_importance(model, IDS, 7)
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in quantized_linears(model).values())


def test_layers_of_one_input_are_told(tiny_model_dir: Any) -> None:
    model, _ = load_base(str(tiny_model_dir("llama")), dtype=torch.float32)
    leaders = shared_inputs(model, quantized_linears(model), IDS[:1])
    block = "model.layers.1."
    assert leaders[block + "self_attn.v_proj"] == leaders[block + "self_attn.k_proj"] == block + "self_attn.q_proj"
    assert leaders[block + "mlp.up_proj"] == block + "mlp.gate_proj"
    assert leaders[block + "self_attn.o_proj"] == block + "self_attn.o_proj"


def test_moments_count_tokens_by_their_weights() -> None:
    layers = {name: nn.Linear(5, 3, bias=False) for name in ("first", "second")}
    x = torch.randn(6, 4, 5)
    weights = torch.rand(6, 4)
    moments = InputMoments(layers, {"first": weights})
    with moments.watch(), torch.no_grad():
        for part in x.split(4):
            for layer in layers.values():
                layer(part)
            layers["second"](part.clone())
    assert moments.groups() == [["first", "second"]]
    rows = x.flatten(0, 1)
    torch.testing.assert_close(moments.sums["first"], rows.T @ (rows * weights.view(-1, 1)))
