"""Whether rows are packed: where it pays, and where it can be done.

A packed micro-batch computes nothing for padding, and its rows need no mask. It costs one call of attention a row, and
one copy of what they give, which rows of one length would pay for nothing.
"""

from __future__ import annotations

import dataclasses

from qrosa.data.order import padded_share
from qrosa.planner.plan import Plan
from qrosa.planner.request import Request

PAYS = 0.03  # share of padding


def may_pack(request: Request) -> bool:
    """The model keeps the rows apart, and the objective does not want them padded."""
    return request.shape.dims.known and not request.train.goal.compares


def with_packing(request: Request, packing: str) -> Request:
    """The same request with ``packing`` set to ``on`` or ``off``."""
    return dataclasses.replace(request, train=dataclasses.replace(request.train, packing=packing))


def padding(plan: Plan) -> float:
    """The share of padding in the first steps, in padded micro-batches of the plan's size; 0 for unknown rows."""
    return padded_share(plan.request.rows.steps, max_rows=plan.work.rows, max_tokens=plan.work.tokens)


def why_padded(plan: Plan) -> str | None:
    """Why a plan's rows had better be padded, in words; None where packing pays."""
    if not plan.request.shape.dims.known:
        return f"rows might see each other in a model of the family {plan.request.shape.dims.family}"
    if plan.work.goal.compares:
        return "answers that are compared are padded"
    if not plan.request.rows.steps:
        return "rows are taken to fill seq-len"
    share = padding(plan)
    return None if share >= PAYS else f"{share:.1%} of the tokens are padding"
