"""The chunked loss against plain cross-entropy, in fp32 and fp64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrosa.data.batching import MicroBatch
from qrosa.errors import InputError
from qrosa.model.head import logit_rule
from qrosa.train.loss import chunked_loss


def make_head(
    width: int, vocabulary: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> torch.nn.Linear:
    head = torch.nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
    return head.requires_grad_(False)


def plain_loss(hidden, labels, head, softcap, scale):
    """The oracle: all logits at once, torch's own cross-entropy."""
    logits = head(hidden).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 19),
    vocabulary=st.integers(1, 37),
    chunk=st.integers(1, 8),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
)
def test_value_and_gradient_equal_plain_cross_entropy(tokens, vocabulary, chunk, softcap, scale, bias):
    torch.manual_seed(tokens * 100 + vocabulary)
    head = make_head(6, vocabulary, bias=bias)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.4] = -100
    ours = torch.randn(tokens, 6, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()

    known = (labels != -100).nonzero().squeeze(1) if tokens % 2 else None
    got = chunked_loss(ours, labels, head, chunk_tokens=chunk, softcap=softcap, scale=scale, supervised=known)
    want = plain_loss(theirs, labels, head, softcap, scale)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (got / 7).backward()
    (want / 7).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_head_runs_only_on_supervised_positions_and_one_chunk_at_a_time():
    rows = []
    head = make_head(4, 11)
    labels = torch.full((40,), -100)
    labels[5:15] = 3
    linear = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        rows.append(x.shape[0])
        return linear(x, weight, bias)

    torch.nn.functional.linear = counting
    try:
        chunked_loss(torch.randn(40, 4), labels, head, chunk_tokens=4)
    finally:
        torch.nn.functional.linear = linear
    assert rows == [4, 4, 2]


def test_bf16_gradient_is_within_one_rounding_of_fp32():
    torch.manual_seed(0)
    head = make_head(32, 100)
    hidden = torch.randn(20, 32).bfloat16()
    labels = torch.randint(0, 100, (20,))
    reference = hidden.float().requires_grad_()
    plain_loss(reference, labels, head.to(torch.bfloat16).to(torch.float32), None, 1.0).backward()
    ours = hidden.clone().requires_grad_()
    chunked_loss(ours, labels, head.to(torch.bfloat16), chunk_tokens=8).backward()
    # bf16 logits (2^-9 relative) then a bf16 matmul: 2% of the largest gradient is well above that noise.
    assert (ours.grad.float() - reference.grad).abs().max() < 0.02 * reference.grad.abs().max()


def test_without_gradient_nothing_is_saved():
    head = make_head(4, 11)
    with torch.no_grad():
        loss = chunked_loss(torch.randn(3, 4), torch.tensor([1, -100, 2]), head)
    assert not loss.requires_grad


def test_a_trainable_head_is_refused():
    head = torch.nn.Linear(4, 11)
    with pytest.raises(InputError, match="head is trainable"):
        chunked_loss(torch.randn(3, 4), torch.tensor([1, 1, 2]), head)


@pytest.mark.parametrize(
    ("attributes", "rule"),
    [
        ({}, (None, 1.0)),
        ({"final_logit_softcapping": 30.0}, (30.0, 1.0)),
        ({"final_logit_softcapping": None}, (None, 1.0)),
        ({"logit_scale": 0.0625}, (None, 0.0625)),
        ({"logits_scaling": 8.0}, (None, 0.125)),
    ],
)
def test_logit_rules_are_read_from_the_config(attributes, rule):
    assert logit_rule(SimpleNamespace(**attributes)) == rule


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_model_loss_equals_transformers_own_loss(family):
    import transformers

    from qrosa.train.loss import model_loss

    extra = {"Gemma2": {"head_dim": 8}, "Cohere": {"logit_scale": 0.3}, "Granite": {"logits_scaling": 3.0}}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra.get(family, {}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().requires_grad_(False).eval()
    ids = torch.randint(3, 64, (2, 9))
    labels = ids.clone()
    labels[0, :5] = -100
    batch = MicroBatch(ids, torch.ones_like(ids), labels, [0, 1])
    total, count = model_loss(model, batch, chunk_tokens=3)
    want = model(input_ids=ids, attention_mask=batch.attention_mask, labels=labels).loss
    assert count == 4 + 8
    torch.testing.assert_close(total / count, want, rtol=1e-5, atol=1e-5)
