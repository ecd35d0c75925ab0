"""Matrices as the budget sees them, and how parameters become whole ranks.

The matrices that have one rank are a unit: each by itself, or with a form that shares tensors all of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrosa.adapters.forms import LORA, LowRankForm, parameter_count
from qrosa.adapters.shared import kind_of
from qrosa.errors import InputError


@dataclass(frozen=True)
class LinearShape:
    """One adaptable matrix of the base.

    Attributes:
        path: Module path, ``model.layers.0.self_attn.q_proj``.
        out_features: N.
        in_features: K.
        layer: Index of the decoder layer, -1 for a module outside the layers.
    """

    path: str
    out_features: int
    in_features: int
    layer: int

    @property
    def size(self) -> int:
        """Number of weights, N * K."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """The rank beyond which a low-rank part gains nothing, min(N, K)."""
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class RankUnit:
    """Matrices that have one rank: a single one, or with a form that shares tensors all of a kind and shape.

    Attributes:
        linears: The matrices.
        form: Of their low-rank parts.
    """

    linears: tuple[LinearShape, ...]
    form: LowRankForm = LORA

    @property
    def full_rank(self) -> int:
        """The rank beyond which it gains nothing."""
        return self.linears[0].full_rank

    @property
    def paths(self) -> list[str]:
        """Of its matrices."""
        return [linear.path for linear in self.linears]

    def cost(self, rank: int) -> int:
        """Parameters of the low-rank parts together, rank * (N + K) for a matrix with LoRA."""
        linear = self.linears[0]
        return parameter_count(self.form, linear.out_features, linear.in_features, rank, len(self.linears))


def rank_units(linears: Sequence[LinearShape], form: LowRankForm) -> list[RankUnit]:
    """What is given a rank, in the order of the first matrix of each."""
    if not form.shared:
        return [RankUnit((linear,), form) for linear in linears]
    kinds: dict[tuple[str, int, int], list[LinearShape]] = {}
    for linear in linears:
        key = kind_of(linear.path), linear.out_features, linear.in_features
        kinds.setdefault(key, []).append(linear)
    return [RankUnit(tuple(members), form) for members in kinds.values()]


def layer_index(path: str) -> int:
    """Index of the decoder layer in a module's path, -1 when the path has none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def spend_on_ranks(
    linears: Sequence[LinearShape],
    budget: int,
    sensitivity: Mapping[str, float] | None = None,
    form: LowRankForm = LORA,
) -> dict[str, int]:
    """Spend at most ``budget`` parameters on whole ranks, by the rule of this module's docstring.

    Returns:
        Module path -> rank, at most min(N, K). One more rank of any module would exceed the budget, or its full rank.
    """
    units = rank_units(linears, form)
    ranks = [0] * len(units)
    while open_ones := [place for place, unit in enumerate(units) if ranks[place] < unit.full_rank]:
        step = _uniform_step([(units[place], ranks[place]) for place in open_ones], budget)
        if step == 0:
            break
        for place in open_ones:
            budget -= units[place].cost(ranks[place] + step) - units[place].cost(ranks[place])
            ranks[place] += step
    order = _leftover_order(units, sensitivity)
    spent = True
    while spent:  # a pass adds at most one rank a unit, so cheap ones do not run away
        spent = False
        for place in order:
            unit, rank = units[place], ranks[place]
            if rank < unit.full_rank and (cost := unit.cost(rank + 1) - unit.cost(rank)) <= budget:
                ranks[place] += 1
                budget -= cost
                spent = True
    return {path: rank for unit, rank in zip(units, ranks, strict=True) for path in unit.paths}


def _uniform_step(held: Sequence[tuple[RankUnit, int]], budget: int) -> int:
    """The most ranks that all units can have more, none beyond a full rank, for at most ``budget`` parameters."""
    low, high = 0, min(unit.full_rank - rank for unit, rank in held)
    while low < high:
        step = (low + high + 1) // 2
        fits = sum(unit.cost(rank + step) - unit.cost(rank) for unit, rank in held) <= budget
        low, high = (step, high) if fits else (low, step - 1)
    return low


def _leftover_order(units: Sequence[RankUnit], sensitivity: Mapping[str, float] | None) -> list[int]:
    """Places of the units in the order in which they are given what is left."""
    cost = [unit.cost(1) for unit in units]
    last = [max(unit.linears, key=lambda linear: linear.layer) for unit in units]
    gain = [0.0] * len(units)
    if sensitivity is not None:
        if not set(sensitivity) & {path for unit in units for path in unit.paths}:
            raise InputError("the sensitivities name no module of this model", "measure them on this base")
        gain = [sum(sensitivity.get(path, 0.0) for path in unit.paths) / cost[at] for at, unit in enumerate(units)]
    return sorted(range(len(units)), key=lambda at: (-gain[at], cost[at], -last[at].layer, last[at].path))


def rank_cost(linears: Sequence[LinearShape], ranks: Mapping[str, int], form: LowRankForm) -> int:
    """Parameters of all low-rank parts."""
    return sum(unit.cost(ranks[unit.paths[0]]) for unit in rank_units(linears, form))
