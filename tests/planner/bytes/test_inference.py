"""Memory of what only computes forward, against the models that do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from qrosa.adapters.inject import quantized_linears
from qrosa.base.shape_source import read_shape
from qrosa.export.verify import VERIFY_ROWS
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes import inference
from qrosa.planner.bytes.inference import verify_bytes
from tests.planner.search.test_solve import GB, SHAPES, made


def model_bytes(model: nn.Module) -> int:
    """Every tensor of a model once, packed weights too."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    for layer in quantized_linears(model).values():
        for tensor in layer.weight.tensors().values():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def test_the_trained_model_in_fp32_is_counted(tiny_model_dir: Callable[..., Path]) -> None:
    import qrosa

    folder = tiny_model_dir("llama")
    model, _ = qrosa.load(str(folder), qrosa.AdapterConfig(rank=4))
    work = made(read_shape(str(folder)), budget="1%", seq_len=64).work
    counted = verify_bytes(work)["trained"]
    real = model_bytes(model.float())
    adapters = sum(p.nbytes for layer in quantized_linears(model).values() for p in layer.adapter_parameters().values())
    assert counted > real - adapters > 0.5 * counted


def test_figures_of_an_8b_model() -> None:
    found = verify_bytes(made(SHAPES["Llama-3.1-8B"]).work)
    assert 15 * GB < found["exported"] == found["peak"] < 19 * GB
    assert 6 * GB < found["trained"] < 10 * GB
    assert found["recorded"] == 6 * VERIFY_ROWS * 2048 * 4096
    assert inference.VERIFY_ROWS == VERIFY_ROWS
    assert parts.base_bytes(SHAPES["Llama-3.1-8B"]) < found["trained"]
