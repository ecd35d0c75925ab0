"""What a budget's ranks go by, where that was left open.

Measured on a small model (docs/accuracy.md, docs/method.md): where the budget does not give every matrix a rank, ranks
by sensitivity do better than the default order in all comparisons; where every matrix has one and some are left over,
the default order does. So the first case measures, and the second need not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qrosa.adapters.budget import allocate
from qrosa.adapters.rank_units import LinearShape
from qrosa.config import AdapterConfig


def with_rank_order(config: AdapterConfig, linears: Sequence[LinearShape], base_parameters: int) -> AdapterConfig:
    """The settings with ``rank_by`` decided; as they are where it was given.

    Args:
        config: The settings.
        linears: The base's adaptable matrices.
        base_parameters: All parameters of the base.

    Raises:
        InputError: A budget that cannot be met.
    """
    if config.rank_by is not None:
        return config
    some_without = False
    if config.budget is not None and config.sparse_share < 1:
        ranks = allocate(config, linears, base_parameters).ranks.values()
        some_without = any(ranks) and not all(ranks)
    return dataclasses.replace(config, rank_by="sensitivity" if some_without else "order")
