"""The drift that is reported is the drift there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qrosa.base.adapter_io import load_run_or_model
from qrosa.data.encode import EncodedRow
from qrosa.errors import InputError
from qrosa.export.card import Facts, render_card
from qrosa.export.merge import merge
from qrosa.export.source import open_adapter, original_folder
from qrosa.export.verify import verify
from qrosa.processor import widens_products
from tests.export.conftest import MakeAdapter


def _rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (4, 9, 17, 30):
        ids = torch.randint(4, 500, (length,), generator=generator).tolist()
        rows.append(EncodedRow(ids, [-100] * (length - 3) + ids[-3:]))
    return rows


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drift_equals_a_direct_computation(
    family: str, tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir(family))
    merge(run, tmp_path / "out", dtype="bf16")
    drift = verify(run, tmp_path / "out", _rows())
    trained = load_run_or_model(str(run))[0].float()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kl, same, losses, tokens = 0.0, 0, [0.0, 0.0], 0
    for row in _rows():
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].float().log_softmax(-1) for model in (trained, exported))
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(row.input_ids) - 1
        for index, log_probs in enumerate((p, q)):
            losses[index] -= float(log_probs[-3:].gather(1, ids[0, -3:, None]).sum())
    assert (drift["rows"], drift["tokens"], drift["supervised_tokens"]) == (4, tokens, 12)
    # On processors that are slow in 16 bits the export runs in fp32 with rounded activations: a near tie may turn.
    near = 1.01 / tokens if widens_products() else 1e-6
    assert drift["top1_agreement"] == pytest.approx(same / tokens, abs=near)
    assert drift["mean_kl"] == pytest.approx(
        kl / tokens, rel=0.2
    )  # Gemma caps its logits in bf16, the head here in fp32
    assert drift["loss_trained"] == pytest.approx(losses[0] / 12, rel=1e-3)
    assert drift["loss_exported"] == pytest.approx(losses[1] / 12, rel=1e-3)
    assert drift["loss_difference"] == pytest.approx(drift["loss_exported"] - drift["loss_trained"])


def test_a_faithful_export_hardly_drifts_and_a_wrong_one_does(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    drifts = {}
    for base in ("nf4", "original"):
        merge(run, tmp_path / base, base=base)
        drifts[base] = verify(run, tmp_path / base, _rows())
    assert drifts["nf4"]["mean_kl"] < 2e-5 and drifts["nf4"]["top1_agreement"] > 0.95
    assert drifts["original"]["mean_kl"] > 100 * drifts["nf4"]["mean_kl"]
    weights = load_file(tmp_path / "nf4" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(weights, tmp_path / "nf4" / "model.safetensors", metadata={"format": "pt"})
    assert verify(run, tmp_path / "nf4", _rows())["mean_kl"] > 10 * drifts["nf4"]["mean_kl"]


def test_the_export_is_compared_with_the_16_bit_model_too(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "out", dtype="bf16")
    original = original_folder(open_adapter(run))
    assert original == tiny_model_dir()
    found = verify(run, tmp_path / "out", _rows(), original=original)["original"]
    sixteen, exported = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (original, tmp_path / "out"))
    kl, loss, tokens = 0.0, 0.0, 0
    for row in _rows():
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].float().log_softmax(-1) for model in (sixteen, exported))
        kl += float((p.exp() * (p - q)).sum())
        loss -= float(p[-3:].gather(1, ids[0, -3:, None]).sum())
        tokens += len(row.input_ids) - 1
    assert found is not None
    assert found["mean_kl"] == pytest.approx(kl / tokens, rel=0.05)
    assert found["loss"] == pytest.approx(loss / 12, rel=1e-3)


def test_overflow_of_activations_is_not_passed_over(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"].fill_(6e4)  # each fits fp16, their products do not
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="activations overflow") as caught:
        verify(run, tmp_path / "out", _rows())
    assert "--dtype bf16" in caught.value.hint


def test_rows_without_supervised_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no supervised tokens"):
        verify(tmp_path, tmp_path, [EncodedRow([1, 2], [-100, -100])])


def test_the_card_shows_the_drift() -> None:
    facts = Facts("org/base", "ab" * 32, "dense", "0.3%", 400_000, 134_000_000, (1, 4), 200, "fp16", "nf4")
    card = render_card(
        facts,
        {
            "rows": 32,
            "tokens": 1234,
            "supervised_tokens": 64,
            "top1_agreement": 0.9987,
            "mean_kl": 1.5e-5,
            "loss_trained": 0.5,
            "loss_exported": 0.501,
            "loss_difference": 0.001,
            "original": {"top1_agreement": 0.8, "mean_kl": 0.02, "loss": 0.75},
        },
    )
    for part in (
        "base_model: org/base",
        "0.299% of the base's (budget 0.3%)",
        "ranks 1 to 4",
        "99.87%",
        "(+0.0010)",
        "80.00%",
        "0.7500",
    ):
        assert part in card
