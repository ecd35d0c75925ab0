"""An allocation in words: which kinds of modules have which rank in which layers, a line for each part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrosa.adapters.budget import Allocation


def describe_allocation(allocation: Allocation) -> list[str]:
    """Where the budget went, in words.

    Returns:
        A line on the whole, then one for each part; ranks that differ are named by kind of module and layer.
    """
    lines = [
        f"{allocation.trainable:,} of {allocation.base_parameters:,} parameters are trained "
        f"({_percent(allocation.share)} of the base)"
    ]
    if allocation.low_rank_parameters:
        lines.append(f"low-rank part: {allocation.low_rank_parameters:,} parameters, {_ranks_in_words(allocation)}")
    else:
        lines.append("low-rank part: none")
    if allocation.sparse_parameters:
        lines.append(
            f"sparse part: {allocation.sparse_parameters:,} values, {_percent(allocation.density)} "
            f"of each of {sum(count > 0 for count in allocation.nnz.values())} matrices"
        )
    else:
        lines.append("sparse part: none")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _ranks_in_words(allocation: Allocation) -> str:
    """``rank 2 on q_proj, o_proj of layers 30 to 31; rank 1 on the other 220 of 224 linear layers``."""
    counts = Counter(allocation.ranks.values())
    usual = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return f"rank {usual} on all {len(allocation.ranks)} linear layers"
    exceptions = [
        f"{f'rank {rank}' if rank else 'none'} on {_places(allocation, rank)}"
        for rank in sorted(set(counts) - {usual}, reverse=True)
    ]
    shown = f"rank {usual}" if usual else "none"
    return f"{'; '.join(exceptions)}; {shown} on the other {counts[usual]} of {len(allocation.ranks)} linear layers"


def _places(allocation: Allocation, rank: int) -> str:
    """Kinds of modules with ``rank``, those with the same layers together."""
    layers: dict[str, list[int]] = defaultdict(list)
    everywhere: dict[str, set[int]] = defaultdict(set)
    for linear in allocation.linears:
        kind = linear.path.rpartition(".")[2]
        everywhere[kind].add(linear.layer)
        if allocation.ranks[linear.path] == rank:
            layers[kind].append(linear.layer)
    by_layers: dict[str, list[str]] = defaultdict(list)
    for kind, indices in layers.items():
        by_layers["every layer" if set(indices) == everywhere[kind] else _ranges(indices)].append(kind)
    return ", ".join(f"{', '.join(kinds)} of {where}" for where, kinds in by_layers.items())


def _ranges(layers: Iterable[int]) -> str:
    """``[3, 4, 5, 9]`` as ``layers 3 to 5, 9``."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    words = [str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return ("layer " if len(words) == 1 and len(parts[0]) == 1 else "layers ") + ", ".join(words)
