"""What a decoder layer of a family without an entry saves for backward, counted on tensors without data.

The model runs forward once for each of three lengths on the meta device, and each layer's saved tensors are summed, a
shared storage once. What grows with the tokens, and with pairs of them, follows from the three sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qrosa.adapters.inject import inject_low_rank, quantized_linears
from qrosa.base.build import empty_model
from qrosa.base.dimensions import KNOWN_HINT, LayerCount
from qrosa.errors import InputError, first_line
from qrosa.ops.card_attention import FusedAttention, card_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LENGTHS = (64, 128, 256)


def count_layer(config: PretrainedConfig, source: str) -> LayerCount:
    """Count what the layer that saves most saves, for one row of tokens.

    Raises:
        InputError: The model does not run on quantised layers: it reads the weights of its linear layers itself.
    """
    model = empty_model(config)
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 1))
    cast(nn.Module, model).to("meta").train()
    try:
        sums = [_most_saved(model, length) for length in _LENGTHS]
    except Exception as error:  # whatever a layer does with a weight that is no tensor
        raise InputError(
            f"{source} ({config.model_type}) does not run on quantised layers: {first_line(error)}", KNOWN_HINT
        ) from None
    return _fit(sums)


def _fit(sums: list[int]) -> LayerCount:
    """The parabola through the three sums, its parts rounded up."""
    short, middle, long = _LENGTHS
    first = (sums[1] - sums[0]) / (middle - short)
    pair = max(0.0, ((sums[2] - sums[1]) / (long - middle) - first) / (long - short))
    token = max(0.0, first - pair * (short + middle))
    fixed = max(0.0, sums[0] - token * short - pair * short * short)
    return LayerCount(-int(-fixed // 1), -int(-token // 1), -int(-pair // 1))


class _Unpadded(TorchDispatchMode):
    """A question about the values of a tensor without data, such as whether all are one, is answered with yes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _most_saved(model: nn.Module, length: int) -> int:
    saved: dict[str, dict[int, Tensor]] = {}
    inside: list[str] = []
    lasting = _lasting(model)

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if inside and key not in lasting:
            saved.setdefault(inside[-1], {})[key] = tensor  # held, so that no other storage takes its place
        return tensor

    handles = []
    for path, block in _blocks(model).items():

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            inside.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        mask = torch.ones_like(ids)
        unpadded = _Unpadded()  # type: ignore[no-untyped-call]
        with (
            FusedAttention(card_attention),
            unpadded,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            cast(Any, model).get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return max(sum(t.untyped_storage().nbytes() for t in layer.values()) for layer in saved.values())


def _lasting(model: nn.Module) -> set[int]:
    """Storages of the model itself, which are saved by reference."""
    packed = [x for layer in quantized_linears(model).values() for x in layer.weight.tensors().values()]
    return {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *packed)}


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks: the modules of the outermost list that holds quantised layers."""
    paths = list(quantized_linears(model))
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stack = next(path for path in stacks if any(name.startswith(f"{path}.") for name in paths))
    return {f"{stack}.{name}": block for name, block in model.get_submodule(stack).named_children()}
