"""What qrosa adds to a family's attention: fp32 where 16-bit products are slow, and rows that lie end to end.

transformers asks a registry for the attention function by name. The functions registered here call what transformers
would have called, eager or fused, and wrap it:

*In fp32*, for processors whose 16-bit products are slow (``qrosa.ops.products``): queries, keys and values are widened,
the result is rounded.

*By row*, for packed micro-batches: rows lie end to end in one [1, T], without padding. Queries, keys and values are cut
at the rows' ends and attention runs once a row, so no row sees another, and a causal kernel needs no mask. One call
under a block mask would compute and hold T^2 scores instead of the sum of the rows' squares; kernels for rows of many
lengths exist for some cards only. The decoder's other layers read one token at a time, or its position, which starts
over with each row.

The rows travel as a keyword argument from the decoder's call down to here. In place of a mask the decoder is handed an
empty one, which transformers passes on as it is; attention that does not know of rows fails on it, loudly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_ROWS = "packed_rows"  # the keyword argument


def attention_name(kind: str, *, wide: bool, by_row: bool) -> str:
    """The name under which transformers finds ``eager`` or ``sdpa`` attention, in fp32 or by row where asked.

    Attention by row takes padded rows, too, and masks them as transformers does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name, function = kind, _eager if kind == "eager" else _fused
    if by_row:
        name, function = f"{name}_by_row", partial(_by_row, function, kind == "eager")
    if wide:
        name, function = f"{name}_in_fp32", partial(_in_fp32, function)
    if name != kind:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name


def rows_of(lengths: Sequence[int], position_ids: Tensor) -> dict[str, Any]:
    """What a decoder is called with, beside ``input_ids`` [1, T], for rows that lie end to end.

    Args:
        lengths: Tokens of each row; T in all.
        position_ids: int64 [1, T], from 0 in each row.
    """
    no_mask = position_ids.new_empty((1, 1, 1, 0))
    return {"attention_mask": no_mask, "position_ids": position_ids, _ROWS: _Rows(lengths)}


class _Rows:
    """The rows of a packed micro-batch, and the masks that all layers share."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def mask(self, length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a row's tokens see, [1, 1, L, L]: yes or no, or for other dtypes 0 or the lowest number.

        Args:
            length: L.
            window: Tokens that a token sees; 0 for all before it.
            dtype: ``bool``, or that of the scores.
            device: Where.
        """
        key = window, dtype
        if key not in self._masks:
            longest = max(self.lengths)
            seen = torch.ones((longest, longest), dtype=torch.bool, device=device).tril_()
            if window:
                seen.triu_(1 - window)
            if dtype != torch.bool:
                added = torch.zeros((longest, longest), dtype=dtype, device=device)
                seen = added.masked_fill_(seen.logical_not_(), torch.finfo(dtype).min)
            self._masks[key] = seen[None, None]
        return self._masks[key][:, :, :length, :length]


def _by_row(
    function: Attention,
    always_masked: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    rows: _Rows | None = settings.pop(_ROWS, None)
    if rows is None:
        return function(module, query, key, value, attention_mask, **settings)
    window = settings.get("sliding_window") or 0
    outputs = []
    # Split and not sliced: backward then joins the pieces' gradients instead of adding up whole ones.
    for piece in zip(*(tensor.split(rows.lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length, mask = piece[0].shape[2], None
        reached = window if 0 < window < length else 0
        if always_masked or reached:
            mask = rows.mask(length, reached, query.dtype if always_masked else torch.bool, query.device)
        outputs.append(function(module, *piece, mask, **settings)[0])
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


def _eager(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    # Each family has its own, beside its attention class: capped scores, sinks.
    here = sys.modules[type(module).__module__]
    output: tuple[Tensor, Tensor | None] = here.eager_attention_forward(module, *tensors, **settings)
    return output


def _fused(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **settings)
    return output


def _in_fp32(
    function: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, scores = function(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return output.to(query.dtype), scores
