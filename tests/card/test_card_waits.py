"""Where the host waits for the card in a micro-batch: each wait lets the card run dry until the host is ahead again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qrosa.base.load import load_base
from qrosa.data.batching import micro_batches
from qrosa.data.encode import EncodedRow
from qrosa.masks.selection_rows import Sample
from qrosa.ops.determinism import deterministic
from qrosa.train.loss import model_loss
from qrosa.train.selection import sample_loss
from tests.card.standin.device import StandIn
from tests.card.test_card_offload import ready

CARD = torch.device("cuda", 0)


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4)])
def test_a_micro_batch_waits_once(card: StandIn, tiny_model_dir: Callable[..., Path], lengths: tuple[int, ...]) -> None:
    """For transformers, which asks whether anything is padded before the first layer: once, and once more if so."""
    with deterministic():
        model = ready(load_base(str(tiny_model_dir()), CARD)[0])
        rows = [EncodedRow(list(range(3, 3 + size)), [-100, -100, *range(5, 3 + size)]) for size in lengths]
        [batch] = micro_batches(rows, max_rows=2, max_tokens=100, pad_id=0)
        card.waits.clear()
        loss, count = model_loss(model, batch.to(CARD))
        (loss / count).backward()
        assert count == sum(size - 2 for size in lengths)
        assert card.waits == ["reading a value"] * (1 if len(set(lengths)) == 1 else 2)


def test_a_selection_sample_waits_before_the_forward_pass_only(
    card: StandIn, tiny_model_dir: Callable[..., Path]
) -> None:
    with deterministic():
        model = ready(load_base(str(tiny_model_dir()), CARD)[0])
        sample = Sample(list(range(3, 12)), [-100, -100, *range(5, 12)])
        loss = sample_loss(256)
        card.waits.clear()
        loss(model, sample).backward()
        assert [wait for wait in card.waits if "from the host" not in wait] == ["reading a value"]
