"""The bytes of calibrated rounding against the storages that it makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.real_models import MODELS
from qrosa.adapters.rank_units import LinearShape
from qrosa.base.shape import from_config
from qrosa.calibrate.matrices import quantize_matrices
from qrosa.measure.tracker import StorageTracker
from qrosa.planner.bytes.calibration import (
    calibration_bytes,
    factor_bytes,
    input_groups,
    rounding_bytes,
)
from qrosa.quant.hessian import InputMoments

SMOL = from_config(
    "smol",
    {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192},
)  # fmt: skip


def measured(rows: list[int], columns: int, sparse: bool, rank: int) -> int:
    """Highest bytes while a group is quantised, beside its moments and weights."""
    linears = {f"linear{n}": nn.Linear(columns, size, bias=False).bfloat16() for n, size in enumerate(rows)}
    moments = InputMoments(linears)
    moments.leader = dict.fromkeys(linears, "linear0")
    x = torch.randn(2 * columns, columns)
    moments.sums["linear0"] = x.T @ x
    positions = {name: torch.arange(0, linear.weight.numel(), 300) for name, linear in linears.items()}
    with torch.no_grad(), StorageTracker("cpu") as tracker, tracker.phase() as found:
        for tensor in (*(linear.weight for linear in linears.values()), moments.sums["linear0"]):
            tracker.count(tensor, "there before")
        before = tracker.live
        quantize_matrices(
            linears, moments, positions if sparse else {}, dict.fromkeys(linears, rank), damping=0.03, seed=0
        )
    return found[0].total - before


@pytest.fixture(scope="module", autouse=True)
def libraries_are_warm() -> None:
    """What the first call of a process makes for good, such as bitsandbytes' tables, is no part of a group's bytes."""
    measured([64], 64, False, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "sparse", "rank"),
    [
        ([512], 512, False, 0),
        ([256], 768, True, 0),
        ([2048], 256, False, 0),
        ([1536], 256, True, 0),
        ([768, 768], 256, True, 4),
        ([768, 768], 256, False, 0),
    ],
)
def test_bytes_are_those_of_the_storages(rows: list[int], columns: int, sparse: bool, rank: int) -> None:
    group = [LinearShape(f"layers.0.linear{n}", size, columns, 0) for n, size in enumerate(rows)]
    planned = max(factor_bytes(group), rounding_bytes(group, sparse, bool(rank)))
    found = measured(rows, columns, sparse, rank)
    assert found <= planned * 1.01 and planned <= found * 1.07


def test_matrices_of_one_input_are_a_group() -> None:
    groups = input_groups(SMOL)
    assert [[linear.path.rpartition(".")[2] for linear in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_an_8b_model_is_quantised_on_24_gb() -> None:
    """Down's second moments [14336, 14336] are the largest of all; the rest follows from the sizes."""
    shape = from_config("8b", MODELS["Llama-3.1-8B"].config)
    planned = calibration_bytes(shape, 128, 512, 8, sparse=True, low_rank=False, on_card=True)
    assert planned["moments"] == 4 * (3 * 4096**2 + 14336**2)
    assert planned["total"] == sum(size for name, size in planned.items() if name != "total") < 20 * 2**30
