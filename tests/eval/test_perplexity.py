"""The loss is transformers' own, whatever the batching and the family."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import nn

from qrosa.data.encode import EncodedRow
from qrosa.errors import InputError, TrainingError
from qrosa.eval.perplexity import evaluate_loss, loss_result
from qrosa.model.head import Head, token_log_probs
from tests.conftest import TINY_FAMILIES
from tests.eval.conftest import LoadTiny


def _rows(count: int = 12) -> list[EncodedRow]:
    source = random.Random(4)
    rows = []
    for _ in range(count):
        ids = [source.randrange(4, 459) for _ in range(source.randint(2, 50))]
        rows.append(EncodedRow(ids, [-100] + [token if source.random() < 0.5 else -100 for token in ids[1:]]))
    return rows


def _reference(model: Any, rows: list[EncodedRow]) -> tuple[float, int]:
    """Sum of losses and supervised tokens, a row at a time, by transformers' own loss."""
    total, count = 0.0, 0
    for row in rows:
        supervised = sum(label != -100 for label in row.labels[1:])
        if supervised:
            with torch.no_grad():
                loss = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            total += float(loss) * supervised
            count += supervised
    return total, count


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_equals_the_model_s_own_loss(family: str, tiny_model: LoadTiny) -> None:
    model, rows = tiny_model(family), _rows()
    result = evaluate_loss(model, rows, max_tokens=120)
    total, count = _reference(model, rows)
    assert result["supervised_tokens"] == count and result["rows"] == len(rows)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_does_not_depend_on_the_batching(tiny_model: LoadTiny) -> None:
    losses = [evaluate_loss(tiny_model("llama"), _rows(), max_tokens=size)["loss"] for size in (1, 64, 4096)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_progress_mode_and_gradients(tiny_model: LoadTiny) -> None:
    model, seen = tiny_model("llama"), []
    model.train()
    evaluate_loss(model, _rows(), max_tokens=64, progress=lambda done, total: seen.append((done, total)))
    assert model.training and torch.is_grad_enabled()
    model.eval()
    assert seen[-1] == (12, 12) and seen == sorted(seen)


def test_no_supervised_token(tiny_model: LoadTiny) -> None:
    with pytest.raises(InputError, match="no row has a token to score"):
        evaluate_loss(tiny_model("llama"), [EncodedRow([5, 6], [-100, -100])])


def test_perplexity_of_hopeless_models_is_still_a_number() -> None:
    assert loss_result(1, 1, 1e6)["perplexity"] == math.inf


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_failure(loss: float) -> None:
    with pytest.raises(TrainingError, match="the loss of these rows is"):
        loss_result(1, 1, loss)


@pytest.mark.parametrize(
    "attribute, value", [("final_logit_softcapping", 3.0), ("logit_scale", 0.25), ("logits_scaling", 4.0)]
)
def test_what_bends_the_logits_is_honoured(attribute: str, value: float) -> None:
    layer = nn.Linear(6, 11, bias=False)
    head = Head(layer, *{"final_logit_softcapping": (3.0, 1.0)}.get(attribute, (None, 0.25)))
    hidden = torch.randn(5, 6)
    raw = layer(hidden)
    expected = {
        "final_logit_softcapping": lambda: 3.0 * torch.tanh(raw / 3.0),
        "logit_scale": lambda: raw * value,
        "logits_scaling": lambda: raw / value,
    }[attribute]()
    torch.testing.assert_close(head.logits(hidden), expected)


@pytest.mark.parametrize("family, attribute", [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_head_reads_the_rule_from_the_config(family: str, attribute: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        **{attribute: 0.3},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 13).view(1, 10)
    with torch.no_grad():
        hidden = model.get_decoder()(ids).last_hidden_state[0]
        expected = model(ids).logits[0].log_softmax(-1)
    found = token_log_probs(model, hidden, ids[0], chunk_tokens=3)
    torch.testing.assert_close(found, expected.gather(1, ids[0, :, None]).squeeze(1), rtol=1e-4, atol=1e-5)
