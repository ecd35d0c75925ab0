"""The checkpoints that a card is measured with: bitsandbytes' format, real shapes, and a probe that runs on them."""

from __future__ import annotations

import json

import pytest
import torch

from bench.compare_plan import CASES, PHASES, Case, longest, measure
from bench.random_checkpoint import SHAPES, write_checkpoint
from qrosa.base.load import load_base
from qrosa.base.shape import ModelShape, from_config

TINY = SHAPES["llama-3.1-8b"] | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("random") / "tiny", TINY)


def test_transformers_and_qrosa_load_the_same_weights(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, _ = load_base(str(folder))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=2e-2, atol=2e-2)


def test_a_case_is_measured_on_the_machine_that_is_here(folder):
    case = Case("tiny", "4GB", "--budget 1%", 64)
    row = measure(folder, case)
    assert row["fits"] and row["tokens_per_s"] > 0
    assert all(row[f"{phase}_measured"] > 0 for phase in PHASES)
    assert "--probe" in row["command"]


def test_the_longest_rows_come_from_the_plan(folder):
    assert longest(folder, Case("tiny", "8GB", "--budget 1%")) == TINY["max_position_embeddings"]


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_has_a_plan_that_fits(name, tmp_path):
    """The cases of a card, from config.json alone: a cap that cannot hold would waste the card's time."""
    from bench.compare_plan import plan

    settings = dict(SHAPES[name])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for case in CASES[name]:
        _, document = plan(tmp_path, case, 2048 if isinstance(case.seq_len, str) else case.seq_len)
        assert document.get("fits"), (case.name, document.get("failed"))


def test_shapes_have_the_published_number_of_parameters():
    billions = {"llama-3.1-8b": 8.03, "mistral-nemo-12b": 12.2, "qwen2.5-32b": 32.8, "llama-3.1-70b": 70.6}
    for name, shape in SHAPES.items():
        found: ModelShape = from_config(name, shape)
        assert found.base_parameters / 1e9 == pytest.approx(billions[name], rel=0.01)
