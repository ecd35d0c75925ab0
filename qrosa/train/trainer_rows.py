"""Rows to select masks on, out of a trainer's dataloader: its rows, as its collator makes them.

Rows are read from the dataset and collated one at a time. The dataloader itself is not iterated: it is in the middle of
an epoch, and a second pass through it would turn its sampler and its count of epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError
from qrosa.train.selection import selection_rows

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def dataloader_rows(dataloader: DataLoader[Any], count: int, seed: int) -> Iterator[Mapping[str, Any]]:
    """``count`` rows of a dataloader, as ``select_masks`` takes them: a function of data set, collator and seed.

    Args:
        dataloader: A trainer's; of a data set without length the first rows are taken.
        count: Rows to draw; packed rows give several each.
        seed: Of the draw.

    Raises:
        InputError: The collator gives no ``input_ids`` or no ``labels``.
    """
    dataset: Any = dataloader.dataset
    drawn = selection_rows(dataset, count, seed) if hasattr(dataset, "__len__") else islice(iter(dataset), count)
    for row in drawn:
        yield from _sequences(dataloader.collate_fn([row]))


def _sequences(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A batch as it is, or cut where its position ids begin anew: rows packed end to end must not see one another."""
    if batch.get("input_ids") is None or batch.get("labels") is None:
        raise InputError(
            f"the trainer's batches hold {', '.join(sorted(batch))}: no input_ids and labels to select masks on",
            "select masks before training: qrosa.select_masks(model, batches)",
        )
    if batch.get("position_ids") is None:
        yield batch
        return
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in pairwise([*starts, len(positions)]):
            yield {"input_ids": ids[start:end], "labels": labels[start:end]}
