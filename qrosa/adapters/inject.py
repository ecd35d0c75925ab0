"""Finding the layers that take adapters, and moving adapters in and out of a model.

Layers are found by type and place, never by a list of names: every ``nn.Linear`` inside a ``ModuleList`` (the decoder's
stack of blocks) is a target, which leaves the head, the embeddings and the norms alone and covers fused and split
projections of any architecture alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qrosa.adapters.forms import LORA, PREFIX, LowRankForm, with_shared
from qrosa.adapters.linear import SPARSE_TENSORS, QRosaLinear
from qrosa.adapters.low_rank import LowRank
from qrosa.adapters.rank_units import LinearShape, layer_index
from qrosa.adapters.shared import kind_of
from qrosa.errors import InputError
from qrosa.sparse.csr import CsrDelta


class AdapterParts(NamedTuple):
    """The adapter of one layer."""

    low_rank: LowRank | None
    sparse: CsrDelta | None


class AdapterParameters(NamedTuple):
    """What is trained, in model order."""

    low_rank: list[nn.Parameter]
    """bf16"""
    sparse: list[nn.Parameter]
    """fp32"""


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers of the decoder's blocks, by path, in model order.

    Raises:
        InputError: The model has no linear layer inside a stack of blocks.
    """
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    targets = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{stack}.") for stack in stacks)
    }
    if not targets:
        raise InputError(
            f"{type(model).__name__} has no linear layers inside a stack of decoder blocks",
            "use a decoder-only model built from nn.Linear, such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
    return targets


def quantized_linears(model: nn.Module) -> dict[str, QRosaLinear]:
    """The quantised linear layers of a loaded base, by path, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QRosaLinear)}


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    """Shapes of the quantised layers, as the budget's arithmetic takes them."""
    return [
        LinearShape(path, layer.out_features, layer.in_features, layer_index(path))
        for path, layer in quantized_linears(model).items()
    ]


def inject_low_rank(
    model: nn.Module,
    ranks: Mapping[str, int],
    alpha: float = 16.0,
    dropout: float = 0.0,
    seed: int = 42,
    form: LowRankForm = LORA,
) -> None:
    """Give each layer its rank (0 leaves it without a low-rank part), from one seed in model order.

    Raises:
        InputError: A path that the model does not have, or a rank that does not fit.
    """
    layers = quantized_linears(model)
    for path in ranks:
        if path not in layers:
            raise InputError(f"the model has no quantised layer {path!r}", "take ranks made for this model")
    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers.items():
        if ranks.get(path, 0):
            layer.add_low_rank(ranks[path], alpha, dropout, generator, form)
    tie_shared(model)


def tie_shared(model: nn.Module) -> None:
    """Make what the low-rank parts of a kind share one parameter each: those of the first such layer."""
    first: dict[tuple[str, tuple[int, int]], LowRank] = {}
    for path, layer in quantized_linears(model).items():
        if layer.low_rank is not None:
            layer.low_rank.share(first.setdefault((kind_of(path), layer.weight.shape), layer.low_rank))


def ramp_low_rank(model: nn.Module, alpha: float, step: int, total: int) -> None:
    """Set the scale of low-rank parts whose form lets it rise over the first steps.

    Args:
        model: A model with an adapter.
        alpha: Scale numerator at the end of the rise.
        step: The step that comes, from 0.
        total: Steps of the run.
    """
    for layer in quantized_linears(model).values():
        part = layer.low_rank
        if part is not None and (rise := part.form.ramp_steps(total)):
            part.alpha = alpha * min(1.0, (step + 1) / rise)


def adapter_parameters(model: nn.Module) -> AdapterParameters:
    """The parameters of every adapter, by part; shared ones once."""
    layers = quantized_linears(model).values()
    low_rank = [tensor for layer in layers if layer.low_rank for tensor in layer.low_rank.tensors().values()]
    sparse = [layer.sparse_values for layer in layers if layer.sparse_values is not None]
    return AdapterParameters(list(dict.fromkeys(low_rank)), sparse)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every adapter parameter once, in model order."""
    layers = quantized_linears(model).values()
    return list(dict.fromkeys(tensor for layer in layers for tensor in layer.adapter_parameters().values()))


def saved_names(model: nn.Module) -> dict[str, str]:
    """Name of each layer's adapter tensors -> their names in a file, where shared ones stand with the first layer."""
    first: dict[int, str] = {}
    return {
        f"{path}.{name}": first.setdefault(id(tensor), f"{path}.{name}")
        for path, layer in quantized_linears(model).items()
        for name, tensor in layer.adapter_tensors().items()
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """All adapter tensors by their names in a file, on the CPU."""
    layers, names = quantized_linears(model), saved_names(model)
    return {
        f"{path}.{name}": tensor.detach().cpu().clone()
        for path, layer in layers.items()
        for name, tensor in layer.adapter_tensors().items()
        if names[f"{path}.{name}"] == f"{path}.{name}"
    }


def load_adapter_state(
    model: nn.Module, state: Mapping[str, Tensor], alphas: Mapping[str, float] | float, dropout: float = 0.0
) -> None:
    """Put saved adapter tensors in place of the adapters that the model has.

    Args:
        model: A loaded base.
        state: Tensors as ``adapter_state`` names them; all are checked before any is used.
        alphas: Scale numerator, for all layers or by path.
        dropout: Dropout of the low-rank part.

    Raises:
        InputError: Tensors of layers that the model does not have, of wrong shapes, or sparse parts that break the
            layout's rules.
    """
    layers = quantized_linears(model)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in state.items():
        path, _, name = full_name.rpartition(".")
        if path not in layers or not (name in SPARSE_TENSORS or name.startswith(PREFIX)):
            raise InputError(
                f"the adapter holds {full_name!r}, which this base does not have", "use the adapter's own base"
            )
        by_layer.setdefault(path, {})[name] = tensor
    shapes = {path: layer.weight.shape for path, layer in layers.items()}
    checked = {}
    for path, tensors in with_shared(by_layer, shapes).items():
        alpha = alphas if isinstance(alphas, (int, float)) else alphas[path]
        checked[path] = saved_parts(path, tensors, layers[path].weight.shape, alpha, dropout)
    for path, layer in layers.items():
        low_rank, sparse = checked.get(path, (None, None))
        layer.set_low_rank(low_rank)
        layer.set_sparse(sparse)
    tie_shared(model)


def saved_parts(
    path: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], alpha: float, dropout: float = 0.0
) -> AdapterParts:
    """One layer's adapter out of its saved tensors, on their device.

    Args:
        path: The layer's, for messages.
        tensors: By their names in a file, without the path.
        shape: (N, K) of the layer.
        alpha: Scale numerator.
        dropout: Dropout of the low-rank part.

    Raises:
        InputError: Tensors are missing, do not fit the layer, or break the sparse layout's rules.
    """
    low_rank = LowRank.saved(path, tensors, shape, alpha, dropout)
    held = [name for name in SPARSE_TENSORS if name in tensors]
    if not held:
        return AdapterParts(low_rank, None)
    if len(held) < len(SPARSE_TENSORS):
        raise InputError(f"the sparse part of {path} is incomplete", "copy the adapter folder again")
    row_ptr, col, values = (tensors[name] for name in SPARSE_TENSORS)
    delta = CsrDelta(row_ptr, col, values, shape)
    delta.check()
    return AdapterParts(low_rank, delta)
