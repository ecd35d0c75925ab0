"""The rows that a mask is selected on: one at a time, unpadded, with one loss each.

A batch of one is the definition, not an economy: the squared score is the mean over samples of the squared gradient
of that sample's own mean loss. It therefore depends on the selection rows alone, not on the micro-batch, its padding,
or how many passes the memory bound asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qrosa.errors import InputError
from qrosa.ops.determinism import deterministic

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        input_ids: Tokens [L].
        labels: [L], the token itself where it carries loss, else -100 (the shift by one is the loss's business).
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


SampleLoss = Callable[[nn.Module, Sample], Tensor]


def read_samples(rows: Iterable[Any], limit: int | None = None) -> list[Sample]:
    """Samples out of encoded rows or batches, those without a supervised token left out.

    Args:
        rows: Objects with ``input_ids`` and ``labels`` lists, mappings of the same, or batches: mappings of
            ``input_ids`` [B, L], ``labels`` [B, L] and perhaps ``attention_mask`` [B, L], whose padding is removed.
        limit: Most samples to take; the rest of ``rows`` is not read.

    Raises:
        InputError: No row has a supervised token, or a row's labels do not match its tokens.
    """
    samples = list(islice((s for row in rows for s in _split(row) if s.supervised), limit))
    if not samples:
        raise InputError(
            "no row to select masks on has a supervised token",
            "check the rows' completions and the chat template, or use --train-on all",
        )
    return samples


def _split(row: Any) -> Iterator[Sample]:
    names = ("input_ids", "labels", "attention_mask")
    fields = {name: row.get(name) if isinstance(row, Mapping) else getattr(row, name, None) for name in names}
    if fields["input_ids"] is None or fields["labels"] is None:
        raise InputError(
            "a selection row has no input_ids or no labels",
            "give rows with input_ids and labels",
        )
    ids, labels = (
        torch.as_tensor(fields["input_ids"]),
        torch.as_tensor(fields["labels"]),
    )
    if ids.shape != labels.shape or ids.ndim not in (1, 2):
        raise InputError(
            f"a selection row has {tuple(ids.shape)} tokens but {tuple(labels.shape)} labels",
            "give one label a token, -100 where there is no loss",
        )
    width = ids.shape[-1]
    mask = torch.ones_like(ids) if fields["attention_mask"] is None else torch.as_tensor(fields["attention_mask"])
    for one, targets, real in zip(
        ids.view(-1, width),
        labels.view(-1, width),
        mask.view(-1, width).bool(),
        strict=True,
    ):
        yield Sample(one[real].tolist(), targets[real].tolist())


def sample_loss(model: nn.Module, sample: Sample) -> Tensor:
    """Mean cross-entropy over the sample's supervised tokens; the head runs at those positions only."""
    device = next(model.parameters()).device
    targets = torch.tensor(sample.labels[1:], device=device)
    at = (targets != IGNORED).nonzero().flatten()
    ids = torch.tensor([sample.input_ids], device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=at).logits[0]
    return functional.cross_entropy(logits.float(), targets[at])


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """While inside: dropout off, no parameter requires grad, and attention's backward is deterministic.

    Layers with activation checkpointing stay in training mode by themselves (transformers checkpoints only then); their
    submodules, where dropout lives, do not.
    """
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for module in training:
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with deterministic():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trained:
            parameter.requires_grad_(True)
