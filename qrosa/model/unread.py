"""Which layers' outputs nobody reads when a block is recomputed, found in the graph that the block has just built."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qrosa.adapters.linear import QRosaLinear

_SAVES_NOTHING = frozenset(
    f"{name}Backward0" for name in ("Add", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Squeeze", "Unsqueeze")
)
"""Sums and views: their backward reads no value of the forward pass."""


def watch_unread_outputs(model: nn.Module) -> None:
    """Have every checkpointed block say, each time it runs, which of its layers' outputs only sums read.

    Going back from the block's output through sums and views, a layer that is met is such a one. Where a norm, a gain
    or a multiplication follows, none is met, and everything is recomputed as before.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for block in model.modules():
        watched = any(isinstance(hook, _Mark) for hook in block._forward_hooks.values())
        if isinstance(block, GradientCheckpointingLayer) and not watched:
            layers = [module for module in block.modules() if isinstance(module, QRosaLinear)]
            block.register_forward_hook(_Mark(layers), with_kwargs=True)


class _Mark:
    def __init__(self, layers: list[QRosaLinear]) -> None:
        self.layers = layers

    def __call__(self, _block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        before = {tensor.grad_fn for tensor in (*inputs, *named.values()) if isinstance(tensor, Tensor)}
        unread = _read_by_sums(first.grad_fn, before)
        for layer in self.layers:
            layer.output_unread = layer.node in unread


def _read_by_sums(last: Any, before: set[Any]) -> set[int]:
    """Ids of the nodes from which only sums and views lead to ``last``, and nothing to any other reader.

    Args:
        last: The node of a block's output, None where it has none.
        before: Nodes of its inputs, at which the block ends.
    """
    if last is None:
        return set()
    readers: dict[Any, int] = {}
    seen, ahead = {last}, [last]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is None or node in before:
                continue
            readers[node] = readers.get(node, 0) + 1
            if node not in seen:
                seen.add(node)
                ahead.append(node)
    found, ahead = set(), [last]
    while ahead:
        node = ahead.pop()
        if type(node).__name__ in _SAVES_NOTHING:
            ahead.extend(parent for parent, _ in node.next_functions if readers.get(parent) == 1)
        else:
            found.add(id(node))
    return found
