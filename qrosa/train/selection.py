"""Mask selection inside a run: which rows it reads, and with which loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from qrosa.data.encode import IGNORE
from qrosa.masks.selection_rows import Sample
from qrosa.model.head import logit_rule
from qrosa.train.loss import chunked_loss

Row = TypeVar("Row")
_SEED_SHIFT = 7919  # the selection's rows are drawn apart from the order of the steps


def selection_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """The training rows that masks are selected on: a function of the seed alone."""
    chosen = random.Random(seed + _SEED_SHIFT).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in chosen]


def sample_loss(chunk_tokens: int) -> Callable[[nn.Module, Sample], Tensor]:
    """A sample's mean loss with the head applied in chunks, for ``select_masks``."""

    def loss(model: nn.Module, sample: Sample) -> Tensor:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        # All that comes from the host, before there is anything on a card to wait for.
        ids, labels = torch.tensor([sample.input_ids], device=device), torch.tensor(sample.labels[1:], device=device)
        places = [place for place, label in enumerate(sample.labels[1:]) if label != IGNORE]
        supervised = torch.tensor(places, dtype=torch.int64, device=device)
        output = model.get_decoder()(input_ids=ids, use_cache=False)  # type: ignore[operator]
        softcap, scale = logit_rule(model.config)
        total = chunked_loss(
            output.last_hidden_state[0, :-1],
            labels,
            model.get_output_embeddings(),  # type: ignore[operator]
            chunk_tokens=chunk_tokens,
            softcap=softcap,
            scale=scale,
            supervised=supervised,
        )
        return total / sample.supervised

    return loss
