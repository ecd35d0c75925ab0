"""Packed micro-batches: the losses and gradients of padded ones, and rows that never see each other."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qrosa.adapters.inject import inject_low_rank, quantized_linears, trainable_parameters
from qrosa.base.load import load_base
from qrosa.config import make_run_config
from qrosa.data.batching import Limits, micro_batches, supervised_tokens
from qrosa.data.encode import EncodedRow
from qrosa.errors import DoesNotFitError
from qrosa.model.attention import rows_of
from qrosa.model.modes import offload_activations, set_attention, set_checkpointing
from qrosa.ops.products import widening
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.train.loss import model_loss
from qrosa.train.run import finetune
from qrosa.train.step import StepRunner
from tests.conftest import TINY_FAMILIES, save_tiny_model
from tests.train.conftest import losses

CPU = torch.device("cpu")
WINDOW = 12
LENGTHS = (40, 3, 17, 1, 12, 13, 2, 29)


def rows_of_lengths(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[EncodedRow]:
    """Rows of random tokens, a third of which carry no loss."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 450, (length,), generator=draw).tolist()
        rows.append(EncodedRow(ids, [-100 if place < length // 3 else token for place, token in enumerate(ids)]))
    return rows


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """Tiny models whose sliding windows, where they have one, are shorter than the rows."""

    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("qwen3", "qwen2") else {}
        window = {} if family in ("llama", "phi3") else {"sliding_window": WINDOW, "use_sliding_window": True}
        save_tiny_model(family, folder, tiny_tokenizer, **window, **kinds)
        return folder

    return folder_of


def trained(folder: Path) -> torch.nn.Module:
    """A base in fp32 with fp32 adapters, so that only the order of sums can differ."""
    model, _ = load_base(str(folder), dtype=torch.float32)
    inject_low_rank(model, dict.fromkeys(quantized_linears(model), 2), dropout=0.0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return model.train()


def gradient(
    model: Any, rows: list[EncodedRow], kind: str, limits: Limits, *, packed: bool, **more: Any
) -> tuple[float, torch.Tensor, StepRunner]:
    set_attention(model, kind, by_row=packed)
    optimizer = AdapterOptimizer(trainable_parameters(model))
    runner = StepRunner(
        model, optimizer, limits=limits, pad_id=3, seed=3, device=CPU, chunk_tokens=5, packed=packed, **more
    )
    loss = runner.gradients(rows, 0, sum(supervised_tokens(row) for row in rows))
    return loss, optimizer.gradients()[0], runner


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "sdpa") for family in (*TINY_FAMILIES, "phi") if family != "gemma2"]  # its scores are capped
    + [(family, "eager") for family in ("llama", "gemma2", "gemma3_text")],
)
def test_the_gradient_is_that_of_padded_rows(family: str, kind: str, windowed: Callable[[str], Path]) -> None:
    model, rows = trained(windowed(family)), rows_of_lengths()
    loss, padded, _ = gradient(model, rows, kind, Limits(8, 10_000), packed=False)
    for limits in (Limits(8, 10_000), Limits(8, 50), Limits(3, 10_000)):
        packed_loss, packed, _ = gradient(model, rows, kind, limits, packed=True)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert (packed - padded).abs().max() < 1e-5 * padded.abs().max()  # fp32 sums in another order


def test_no_row_sees_another(windowed: Callable[[str], Path]) -> None:
    """Other tokens, or another length, in one row leave every bit of the other rows' hidden states as they were."""
    for family, kind in (("gemma3_text", "sdpa"), ("gemma2", "eager"), ("qwen3", "sdpa")):
        model = trained(windowed(family)).eval()
        set_attention(model, kind, by_row=True)
        rows, others = rows_of_lengths((20, 17, 30)), rows_of_lengths((9, 17, 9), seed=1)
        others[1] = rows[1]
        found = []
        for chosen in (rows, others):
            (batch,) = micro_batches(chosen, max_rows=8, max_tokens=1000, pad_id=3, packed=True)
            assert batch.lengths is not None and batch.position_ids is not None
            with torch.no_grad():
                states = model.get_decoder()(batch.input_ids, **rows_of(batch.lengths, batch.position_ids))[0][0]
            found.append(states.split(batch.lengths)[batch.row_ids.index(1)])
        assert torch.equal(*found), family


def test_recomputation_and_offload_change_no_bit(windowed: Callable[[str], Path]) -> None:
    model, rows = trained(windowed("gemma3_text")), rows_of_lengths()
    for layer in quantized_linears(model).values():
        layer.low_rank.dropout = 0.3
    _, kept, _ = gradient(model, rows, "sdpa", Limits(8, 60), packed=True)
    set_checkpointing(model, True)
    _, recomputed, _ = gradient(model, rows, "sdpa", Limits(8, 60), packed=True)
    offload_activations(model, CPU)
    _, offloaded, _ = gradient(model, rows, "sdpa", Limits(8, 60), packed=True)
    assert kept.abs().max() > 0 and torch.equal(kept, recomputed) and torch.equal(kept, offloaded)


def test_products_in_fp32(windowed: Callable[[str], Path]) -> None:
    """On a processor that is slow in 16 bits: bf16 models, whose attention is widened around the rows."""
    gradients = {}
    for packed in (False, True):
        model, _ = load_base(str(windowed("mistral")))
        inject_low_rank(model, dict.fromkeys(quantized_linears(model), 2), dropout=0.0)
        for parameter in trainable_parameters(model):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        with widening("cpu", True):
            _, gradients[packed], _ = gradient(model.train(), rows_of_lengths(), "sdpa", Limits(8, 999), packed=packed)
            assert model.config._attn_implementation == ("sdpa_by_row_in_fp32" if packed else "sdpa_in_fp32")
    assert (gradients[True] - gradients[False]).norm() < 0.02 * gradients[False].norm()  # bf16 between the layers


def test_memory_that_runs_out_is_halved_by_rows(windowed: Callable[[str], Path], monkeypatch: Any) -> None:
    """A packed micro-batch is one row of tensors, but many rows to be halved."""
    model, rows = trained(windowed("llama")), rows_of_lengths()
    _, small, _ = gradient(model, rows, "sdpa", Limits(4, 58), packed=True)
    seen: list[int] = []

    def tight(model: Any, batch: Any, chunk_tokens: int) -> Any:
        seen.append(len(batch.row_ids))
        if seen == [8] or least:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model_loss(model, batch, chunk_tokens)

    least = False
    monkeypatch.setattr("qrosa.train.step.model_loss", tight)
    _, halved, runner = gradient(model, rows, "sdpa", Limits(8, 10_000), packed=True)
    assert runner.limits == Limits(4, sum(LENGTHS) // 2) and torch.equal(halved, small)
    least = True
    with pytest.raises(DoesNotFitError, match="one row of 40 tokens"):
        gradient(model, rows, "sdpa", Limits(8, 10_000), packed=True)


def test_attention_that_does_not_know_of_rows_fails(windowed: Callable[[str], Path]) -> None:
    model = trained(windowed("llama"))
    for kind in ("eager", "sdpa"):
        set_attention(model, kind)
        (batch,) = micro_batches(rows_of_lengths((5, 6)), max_rows=8, max_tokens=1000, pad_id=3, packed=True)
        with pytest.raises(RuntimeError, match=r"size|mask"):
            model_loss(model, batch)


@pytest.fixture
def uneven(tiny_rows: Any) -> str:
    """A file of 24 rows, some of them many times as long as others."""
    words = "the film was good and the acting was better ".split()
    rows = [{"text": " ".join(words * (1 + 5 * (index % 5 == 0)) + words[: index % 7])} for index in range(24)]
    return str(tiny_rows(rows, name="uneven.jsonl"))


def learnt(settings: Any) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The losses of a run, and its adapter."""
    finetune(settings)
    return losses(settings.output), load_file(Path(settings.output) / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("offload", ["none", "activations", "base"])
def test_a_run_learns_what_a_padded_one_does(config: Any, uneven: str, tmp_path: Path, offload: str) -> None:
    """bf16 between the layers and in the low-rank part: values agree to its rounding, carried through six steps."""
    common = {"data": uneven, "offload": offload, "rank": 4, "density": 0.01, "mask_score": "random"}
    padded, packed = (
        learnt(config(packing=packing, output=str(tmp_path / packing), **common)) for packing in ("off", "on")
    )
    assert packed[0] == pytest.approx(padded[0], rel=2e-3)
    for name, tensor in padded[1].items():
        if tensor.is_floating_point():
            assert (packed[1][name].float() - tensor.float()).norm() < 0.1 * tensor.float().norm() + 1e-6, name
        else:
            assert torch.equal(packed[1][name], tensor), name  # positions


def test_killed_and_resumed_equals_one_go(settings: Any, run_in_process: Any, tmp_path: Path) -> None:
    values = settings(max_steps=8, save_every=3, dropout=0.1, packing="on", eval_split="20%")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(make_run_config({**values, "output": str(whole)}))
    killed = run_in_process({**values, "output": str(broken)}, kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finetune(make_run_config({**values, "output": str(broken)}), resume=True)
    assert losses(broken) == losses(whole)
    names = ("adapter/adapter.safetensors", "eval.jsonl")
    assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_rows_of_many_lengths_are_packed_by_themselves(config: Any, recorder: Any, uneven: str) -> None:
    report = finetune(config(data=uneven, eval_split="10%"), callbacks=[recorder])
    assert report["packing"] == "on"
    assert any("rows end to end" in text for text in recorder.notices)
    assert json.loads((Path(config().output) / "plan.json").read_text())["settings"]["packing"] is True


def test_rows_of_one_length_are_not(config: Any, tiny_rows: Any) -> None:
    rows = [{"text": f"the film was {index % 10} and good"} for index in range(24)]
    assert finetune(config(data=str(tiny_rows(rows, name="even.jsonl"))))["packing"] == "off"


def test_smollm2(smollm2: Path, tmp_path: Path, tiny_rows: Any) -> None:
    """A real model, a few steps with each: losses as close as bf16 between the layers lets them be."""
    words = ["The film was a delight.", "Dull.", "It drags on, and nobody in it seems to know why it was made at all."]
    rows = [{"prompt": f"{words[index % 3]} Sentiment:", "completion": " good" if index % 3 == 0 else " bad"}
            for index in range(12)]  # fmt: skip
    found = {}
    for packing in ("off", "on"):
        values = {"model": str(smollm2), "data": str(tiny_rows(rows)), "output": str(tmp_path / packing)}
        values |= {"rank": 2, "density": 0, "batch_size": 6, "max_steps": 3, "lr": 1e-3, "packing": packing}
        found[packing] = learnt(make_run_config(values))
    assert found["on"][0] == pytest.approx(found["off"][0], rel=0.02)
    assert found["on"][0][3] < found["on"][0][1]
