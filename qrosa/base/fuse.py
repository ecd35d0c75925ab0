"""Norms and gated feed-forward blocks of transformers' models, replaced by ops that save less and run faster.

A module is known by what it does, never by its name: it has the parts of an RMSNorm or of a gated block, and on a small
random input the op gives what it gives, in fp32 and with bf16's roundings. One that gives anything else is left alone.
Parameters and layers keep their names, so that nothing else can tell the difference.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import replace_module
from qrosa.ops.gate import GatedBlock, JoinedGatedBlock, gate
from qrosa.ops.rms_norm import RMSNorm, rms_norm

_NORMS = ((0.0, True), (0.0, False), (1.0, False))
"""Offset and rounding of the norms that are known: Llama's, OLMo's, Gemma's."""
_ACTIVATIONS = (False, True)
"""SiLU, and GELU by its tanh formula."""
_UNEQUAL = 0.02
"""Share of bf16 results that may differ in the last bit, where the order of an fp32 sum decides; another order of
roundings changes a third of them."""
_BLOCKS = {
    frozenset(("gate_proj", "up_proj", "down_proj")): GatedBlock,
    frozenset(("gate_up_proj", "down_proj")): JoinedGatedBlock,
}
_WIDTH = 24


def fuse_layers(model: nn.Module) -> None:
    """Replace what is known in a model whose parameters may be on ``meta``; linear layers are still ``nn.Linear``."""
    known: dict[Any, Any] = {}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, names in paths.items():
        made = None if len(names) > 1 else _norm_for(module, known) or _block_for(module, known)
        if made is not None:
            replace_module(model, names[0], made.train(module.training))


def _norm_for(module: nn.Module, known: dict[Any, Any]) -> RMSNorm | None:
    """An RMSNorm that does what ``module`` does, with its weight."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = len(module._parameters) == 1 and not module._buffers and not module._modules
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or not plain or not _takes_one(module):
        return None
    key = *_identity(module), weight.numel()
    if key not in known:
        known[key] = _settings_of_norm(module, weight.numel(), eps)
    return None if known[key] is None else RMSNorm(weight, eps, *known[key])


def _settings_of_norm(module: nn.Module, width: int, eps: float) -> tuple[float, bool] | None:
    twin, x, weight = _twin(module), _random(8, width, 0), _random(1, width, 1)[0]
    x[0] *= eps**0.5  # where eps counts

    def given(dtype: torch.dtype) -> Tensor:
        twin._parameters = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
        return twin(x.to(dtype))  # type: ignore[no-any-return]

    for settings in _NORMS:
        if _same(given, lambda dtype, s=settings: rms_norm(x.to(dtype), weight.to(dtype), eps, *s)):
            return settings
    return None


def _block_for(module: nn.Module, known: dict[Any, Any]) -> nn.Module | None:
    """A gated block that does what ``module`` does, with its layers."""
    layers = {name: layer for name, layer in module._modules.items() if isinstance(layer, nn.Linear)}
    kind, others = _BLOCKS.get(frozenset(layers)), [x for x in module._modules.values() if x not in layers.values()]
    plain = not module._parameters and not module._buffers and not any(_has_more(other) for other in others)
    if kind is None or not plain or not _takes_one(module):
        return None
    key = *_identity(module), *(repr(other) for other in others)
    if key not in known:
        known[key] = _activation_of_block(module, layers)
    return None if known[key] is None else kind(layers, known[key])


def _activation_of_block(module: nn.Module, layers: dict[str, nn.Linear]) -> bool | None:
    """Which activation a small copy of the block turns out to have."""
    twin = _twin(module)
    inner = {name: 2 if name == "gate_up_proj" else 1 for name in layers}
    x, results = _random(8, _WIDTH, 0), {}

    def given(dtype: torch.dtype) -> Tensor:
        twin._modules = dict(module._modules)
        for seed, name in enumerate(sorted(layers), start=1):
            weight = _random(inner[name] * _WIDTH, _WIDTH, seed)
            small = nn.Linear(_WIDTH, inner[name] * _WIDTH, bias=False, device="meta")
            small.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            twin._modules[name] = results[name] = small
        return twin(x.to(dtype))  # type: ignore[no-any-return]

    def expected(dtype: torch.dtype, gelu: bool) -> Tensor:
        wide = x.to(dtype)
        joined = "gate_up_proj" in layers
        halves = results["gate_up_proj"](wide).chunk(2, -1) if joined else ()
        both = halves or (results["gate_proj"](wide), results["up_proj"](wide))
        return results["down_proj"](gate(both[0], both[1], gelu))  # type: ignore[no-any-return]

    for gelu in _ACTIVATIONS:
        if _same(given, lambda dtype, g=gelu: expected(dtype, g)):
            return gelu
    return None


def _same(given: Any, expected: Any) -> bool:
    """Whether two functions of a dtype give the same; one that cannot run gives something else."""
    try:
        with torch.no_grad():
            theirs, ours = given(torch.float32), expected(torch.float32)
            close = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5)
            theirs, ours = given(torch.bfloat16), expected(torch.bfloat16)
            unequal = (theirs != ours).float().mean().item()
    except Exception:  # a module of any kind, called in a way that it may not know
        return False
    return bool(close) and theirs.dtype == ours.dtype and unequal <= _UNEQUAL


def _takes_one(module: nn.Module) -> bool:
    """Whether forward takes one tensor, and nothing runs around it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return not hooked and len(inspect.signature(module.forward).parameters) == 1


def _has_more(module: nn.Module | None) -> bool:
    """Whether a part of a block is more than an activation: it has parameters, or drops elements."""
    if module is None:
        return False
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    return drops or next(module.parameters(), None) is not None


def _identity(module: nn.Module) -> tuple[Any, ...]:
    """Modules with the same one do the same: their class, and what they hold beside parameters and parts."""
    plain = (bool, int, float, str, type(None))
    held = [(name, value) for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    return type(module), *((name, value if isinstance(value, plain) else id(value)) for name, value in held)


def _twin(module: nn.Module) -> nn.Module:
    """A copy that shares the parts, and trains: what is random then is not replaced."""
    twin = copy.copy(module)
    twin.training = True
    return twin


def _random(rows: int, columns: int, seed: int) -> Tensor:
    """Normal numbers that leave torch's own generator alone."""
    return torch.randn(rows, columns, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
