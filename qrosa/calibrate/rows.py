"""Calibration rows: token windows of one length, drawn from rows that were given or written by the model itself.

Given rows are shuffled by seed, joined and cut into windows, so that short rows fill windows and long ones give many.
The windows that are held out are the last ones: no calibration sees them.

Without rows the model writes its own: windows sampled from it at temperature 1, half of them from a token drawn from
the vocabulary (text of every kind that it knows), half from the start of a chat where it has a chat template (its
users' questions and its own answers). No text is shipped and none is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOGETHER = 96  # rows written at once: the weights are decoded once for all, and their keys and values must fit


def windows(rows: Iterable[list[int]], count: int, length: int, seed: int) -> Tensor:
    """Up to ``count`` windows int64 [B, L] out of token rows.

    Raises:
        InputError: The rows hold less than two windows: one to calibrate on, one to hold out.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    joined: list[int] = []
    for row in shuffled:
        joined += row
        if len(joined) >= count * length:
            break
    whole = min(count, len(joined) // length)
    if whole < 2:
        raise InputError(
            f"the calibration rows hold {len(joined)} tokens, and two windows of {length} are the least",
            "give more rows, or leave --calibration out",
        )
    return torch.tensor(joined[: whole * length]).view(whole, length)


@torch.no_grad()
def written_by(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``count`` windows int64 [count, L] that the model samples, from plain text and from chats by turns."""
    starts = _starts(tokenizer, count, seed)
    device = cast(Any, model).get_input_embeddings().weight.device
    written = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for kind in starts:
            for first in kind.split(_TOGETHER):
                output = cast(Any, model).generate(
                    first.to(device),
                    attention_mask=torch.ones_like(first).to(device),
                    min_length=length,
                    max_length=length,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=[],
                    pad_token_id=0,
                )
                written.append(output.cpu())
                if progress:
                    progress(sum(len(part) for part in written), count)
    return torch.cat(written)


def _starts(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Tensor]:
    """First tokens of the windows, int64 [rows, tokens] for each kind of start."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    plain = [token for token in range(len(tokenizer)) if token not in special]
    chat = _chat_start(tokenizer)
    chats = count // 2 if chat else 0
    drawn = torch.tensor(plain)[torch.randint(len(plain), (count - chats,), generator=generator)]
    first = drawn[:, None]
    if tokenizer.bos_token_id is not None and not chat:
        first = torch.cat((torch.full_like(first, tokenizer.bos_token_id), first), 1)
    return [first, *([torch.tensor(chat).repeat(chats, 1)] if chats else [])]


def _chat_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a chat up to the user's first word; empty without a chat template."""
    if not tokenizer.chat_template:
        return []
    marker = "qrosa"
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False))
    before, found, _ = text.partition(marker)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if found and before else []
