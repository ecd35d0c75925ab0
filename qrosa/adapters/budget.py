"""From a budget to ranks and numbers of sparse values, module by module, in whole parameters.

A rank-r part of an [N, K] matrix costs what its form says, r * (N + K) parameters for LoRA, a sparse part one per
position. Where a form shares tensors between matrices of a kind, these have one rank and count as one module below.
The low-rank share of the budget is spent in three steps:

1. *Uniformly*: the largest rank that all modules can have.
2. *What is left*, in whole +1 ranks, one a module: cheapest modules first, ties from the last decoder layer down. A
   cheap rank covers a module for the fewest parameters, so this covers the most modules; among equals the last layers
   come first, where rank allocation by measured importance puts most of it too (AdaLoRA, arXiv 2303.10512, figure 3).
   With measured sensitivities (``qrosa.masks.sensitivity``) the order is by sensitivity per parameter instead.
3. *Again*, in the same order, until one more rank anywhere would exceed the budget.

Whatever no whole rank fits into goes to the sparse part, so a budget with a sparse part is used to the last parameter.
Sparse positions are shared out in proportion to N * K, by largest remainder, never more than N * K a matrix. The
alternative, one rank everywhere, leaves up to the cost of one rank of all modules unspent: on a 135M model that is
three quarters of a 0.3% budget.

Shares are of all parameters of the base, embeddings included, a tied head once. The result depends on the modules and
not on their order: a plan made from a file's header and a loaded model agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrosa.adapters.forms import LORA, LowRankForm, form_named
from qrosa.adapters.rank_units import LinearShape, rank_cost, rank_units, spend_on_ranks
from qrosa.config import AdapterConfig
from qrosa.errors import InputError
from qrosa.quantities import parse_budget


@dataclass(frozen=True)
class Allocation:
    """Where the trainable parameters are.

    Attributes:
        ranks: Module path -> rank of its low-rank part, 0 for none; every module is named.
        nnz: Module path -> number of its sparse values, 0 for none; every module is named.
        low_rank_parameters: Of all low-rank parts.
        sparse_parameters: Sum of nnz.
        base_parameters: Parameters of the base, what shares refer to.
        linears: The modules, in model order.
        form: Name of the low-rank parts' form.
    """

    ranks: dict[str, int]
    nnz: dict[str, int]
    low_rank_parameters: int
    sparse_parameters: int
    base_parameters: int
    linears: tuple[LinearShape, ...] = ()
    form: str = LORA.name

    @property
    def trainable(self) -> int:
        """All trainable parameters."""
        return self.low_rank_parameters + self.sparse_parameters

    @property
    def share(self) -> float:
        """Trainable parameters over the base's."""
        return self.trainable / self.base_parameters

    @property
    def rank(self) -> float:
        """The common rank, or the mean over modules where ranks differ."""
        ranks = set(self.ranks.values())
        return ranks.pop() if len(ranks) == 1 else sum(self.ranks.values()) / len(self.ranks)

    @property
    def nnz_total(self) -> int:
        """All sparse values."""
        return self.sparse_parameters

    @property
    def density(self) -> float:
        """Sparse values over the weights of all modules."""
        return self.sparse_parameters / sum(linear.size for linear in self.linears) if self.linears else 0.0


def allocate(
    config: AdapterConfig,
    linears: Sequence[LinearShape],
    base_parameters: int,
    *,
    sensitivity: Mapping[str, float] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Allocation:
    """Turn a budget, or a rank and a density, into ranks and numbers of sparse values.

    Args:
        config: The settings.
        linears: The base's adaptable matrices, in model order.
        base_parameters: All parameters of the base, a tied head counted once.
        sensitivity: Module path -> how much the loss gains from a rank there, any unit; modules that are not named
            count 0. Decides only where the ranks beyond the uniform ones go.
        ranks: Module path -> rank, where a budget's ranks are known from a run that goes on; modules that are not
            named have none. What they leave of the budget goes to the sparse part, as it did then.

    Raises:
        InputError: A budget that no whole parameters can meet: below one rank, above 100%, or a mask with more
            positions than the matrices have.
    """
    if not linears:
        raise InputError("the model has no linear layers to adapt", "use a decoder-only model, such as Llama or Qwen")
    form = form_named(config.low_rank)
    if config.low_rank_init != "lora" and form is not LORA:
        raise InputError(
            f"--low-rank {form.name} cannot start at the error of the base, which is a product of two free matrices",
            "leave --low-rank-init at lora",
        )
    if config.budget is not None:
        given = None if ranks is None else {linear.path: ranks.get(linear.path, 0) for linear in linears}
        rank_of, nnz_of = _from_budget(config, linears, base_parameters, sensitivity, given, form)
    else:
        rank_of, nnz_of = _explicit(config, linears)
    return Allocation(
        ranks=rank_of,
        nnz=nnz_of,
        low_rank_parameters=rank_cost(linears, rank_of, form),
        sparse_parameters=sum(nnz_of.values()),
        base_parameters=base_parameters,
        linears=tuple(linears),
        form=form.name,
    )


def _from_budget(
    config: AdapterConfig,
    linears: Sequence[LinearShape],
    base_parameters: int,
    sensitivity: Mapping[str, float] | None,
    given: dict[str, int] | None,
    form: LowRankForm,
) -> tuple[dict[str, int], dict[str, int]]:
    total = _total(config, base_parameters)
    low_rank = total - math.floor(total * config.sparse_share)
    ranks = given or spend_on_ranks(linears, low_rank if config.sparse_share < 1 else 0, sensitivity, form)
    used = rank_cost(linears, ranks, form)
    if config.sparse_share > 0:
        return ranks, _share_out(linears, total - used, f"budget {config.budget}")
    cheapest = min(unit.cost(1) for unit in rank_units(linears, form))
    if used == 0:
        raise InputError(
            f"budget {config.budget} is {total:,} parameters, less than one rank of the smallest layer ({cheapest:,})",
            f"raise the budget to {100 * cheapest / base_parameters:.2g}% or more, or leave --sparse-share above 0",
        )
    most = sum(unit.cost(unit.full_rank) for unit in rank_units(linears, form))
    if total > most:
        raise InputError(
            f"budget {config.budget} is {total:,} parameters, more than full-rank adapters have ({most:,})",
            "lower the budget; 0.1% to 2% is usual",
        )
    return ranks, dict.fromkeys(ranks, 0)


def _total(config: AdapterConfig, base_parameters: int) -> int:
    """The budget as a count of parameters, rounded down."""
    assert config.budget is not None
    kind, value = parse_budget(config.budget)
    total = math.floor(value * base_parameters) if kind == "share" else int(value)
    if total < 1:
        raise InputError(
            f"budget {config.budget} of {base_parameters:,} parameters is less than one parameter",
            "raise the budget; 0.1% to 2% is usual",
        )
    if total > base_parameters:
        raise InputError(
            f"budget {config.budget} is more than 100% of the base ({base_parameters:,} parameters)",
            "lower the budget; 0.1% to 2% is usual",
        )
    return total


def _explicit(config: AdapterConfig, linears: Sequence[LinearShape]) -> tuple[dict[str, int], dict[str, int]]:
    """One rank and one density (or count a layer) for all modules; a rank stops at a matrix's full rank."""
    rank = config.rank or 0
    widest = max(linear.full_rank for linear in linears)
    if rank > widest:
        raise InputError(
            f"rank {rank} is more than any matrix of this model has ({widest})", f"use a rank of at most {widest}"
        )
    ranks = {linear.path: min(rank, linear.full_rank) for linear in linears}
    if config.sparse_per_layer:
        nnz: dict[str, int] = {}
        for layer in dict.fromkeys(linear.layer for linear in linears):
            own = [linear for linear in linears if linear.layer == layer]
            nnz |= _share_out(own, config.sparse_per_layer, f"--sparse-per-layer {config.sparse_per_layer}")
        return ranks, {linear.path: nnz[linear.path] for linear in linears}
    positions = sum(linear.size for linear in linears)
    nnz = _share_out(linears, math.floor((config.density or 0.0) * positions), f"density {config.density}")
    if not rank and not sum(nnz.values()):
        raise InputError(
            f"density {config.density} of {positions:,} weights is less than one sparse value",
            "raise --density, or give a --rank",
        )
    return ranks, nnz


def _share_out(linears: Sequence[LinearShape], total: int, wanted_by: str) -> dict[str, int]:
    """Share ``total`` sparse values out in proportion to N * K, by largest remainder, exactly.

    No matrix gets more than its N * K positions: a quota is at most N * K, and one that is rounded up was below it.
    """
    positions = sum(linear.size for linear in linears)
    if total > positions:
        raise InputError(
            f"{wanted_by} asks for {total:,} sparse values and the matrices have {positions:,} positions",
            "ask for less, or give the low-rank part a share (--sparse-share below 1)",
        )
    nnz = {linear.path: total * linear.size // positions for linear in linears}
    missing = total - sum(nnz.values())
    by_remainder = sorted(linears, key=lambda linear: (-(total * linear.size % positions), linear.path))
    for linear in by_remainder[:missing]:
        nnz[linear.path] += 1
    return nnz
