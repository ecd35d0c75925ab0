"""Finding the layers that take adapters, and moving adapters in and out of a model.

Layers are found by type and place, never by a list of names: every ``nn.Linear`` inside a ``ModuleList`` (the decoder's
stack of blocks) is a target, which leaves the head, the embeddings and the norms alone and covers fused and split
projections of any architecture alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qrosa.adapters.budget import LinearShape
from qrosa.adapters.linear import QRosaLinear
from qrosa.errors import InputError
from qrosa.sparse.csr import CsrDelta

_TENSORS = ("low_rank_A", "low_rank_B", "sparse_row_ptr", "sparse_col", "sparse_values")


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers of the decoder's blocks, by path, in model order.

    Raises:
        InputError: The model has no linear layer inside a stack of blocks.
    """
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{stack}.") for stack in stacks)
    }
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layers inside a stack of decoder blocks",
            "use a decoder-only model built from nn.Linear, such as Llama, Mistral, Qwen, Gemma or Phi-3",
        )
    return found


def quantized_linears(model: nn.Module) -> dict[str, QRosaLinear]:
    """The quantised linear layers of a loaded base, by path, in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QRosaLinear)}


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def layer_index(path: str) -> int:
    """Index of the decoder layer in a module's path, -1 when the path has none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    """Shapes of the quantised layers, as the budget's arithmetic takes them."""
    return [
        LinearShape(path, layer.out_features, layer.in_features, layer_index(path))
        for path, layer in quantized_linears(model).items()
    ]


def inject_low_rank(
    model: nn.Module, ranks: Mapping[str, int], alpha: float = 16.0, dropout: float = 0.0, seed: int = 42
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
            layer.add_low_rank(ranks[path], alpha, dropout, generator)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every adapter parameter, in model order."""
    return [
        parameter for layer in quantized_linears(model).values() for parameter in layer.adapter_parameters().values()
    ]


def set_adapter_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters of all layers on or off; off is the bare base."""
    for layer in quantized_linears(model).values():
        layer.adapter_enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """All adapter tensors by name, on the CPU, as they are saved."""
    state = {}
    for path, layer in quantized_linears(model).items():
        for name in _TENSORS:
            tensor = getattr(layer, name)
            if tensor is not None:
                state[f"{path}.{name}"] = tensor.detach().cpu().clone()
    return state


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
        if path not in layers or name not in _TENSORS:
            raise InputError(
                f"the adapter holds {full_name!r}, which this base does not have", "use the adapter's own base"
            )
        by_layer.setdefault(path, {})[name] = tensor
    deltas = {path: _checked_delta(path, layers[path], tensors) for path, tensors in by_layer.items()}
    for path, layer in layers.items():
        tensors = by_layer.get(path, {})
        layer.low_rank_A = layer.low_rank_B = None
        if "low_rank_A" in tensors:
            layer.low_rank_A = nn.Parameter(tensors["low_rank_A"].to(layer.device, torch.bfloat16))
            layer.low_rank_B = nn.Parameter(tensors["low_rank_B"].to(layer.device, torch.bfloat16))
            layer.alpha = float(alphas if isinstance(alphas, (int, float)) else alphas[path])
            layer.dropout = dropout
        layer.set_sparse(deltas.get(path))


def _checked_delta(path: str, layer: QRosaLinear, tensors: Mapping[str, Tensor]) -> CsrDelta | None:
    """Check one layer's tensors against its shape; its sparse part, if it has one."""
    low_rank = ("low_rank_A" in tensors, "low_rank_B" in tensors)
    sparse = [name in tensors for name in _TENSORS[2:]]
    hint = "use the base that the adapter was trained on"
    if any(low_rank) != all(low_rank) or any(sparse) != all(sparse):
        raise InputError(f"the adapter of {path} is incomplete", "copy the adapter folder again")
    if all(low_rank):
        a, b = tensors["low_rank_A"], tensors["low_rank_B"]
        fits = a.ndim == b.ndim == 2 and (b.shape[0], a.shape[1]) == layer.weight.shape and a.shape[0] == b.shape[1]
        if not fits:
            raise InputError(
                f"the low-rank part of {path} has shapes {tuple(a.shape)} and {tuple(b.shape)} for a "
                f"{layer.out_features} x {layer.in_features} matrix",
                hint,
            )
    if not all(sparse):
        return None
    delta = CsrDelta(tensors["sparse_row_ptr"], tensors["sparse_col"], tensors["sparse_values"], layer.weight.shape)
    delta.check()
    return delta
