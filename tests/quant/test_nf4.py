"""NF4Weight against bitsandbytes, byte for byte."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from qrosa.quant.nf4 import NF4Weight

SHAPES = [(1, 1), (3, 5), (7, 64), (5, 33), (64, 64), (96, 200), (129, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_dequantises_to_the_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    torch.manual_seed(0)
    packed, state = functional.quantize_4bit(
        torch.randn(shape, dtype=dtype), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    ours = NF4Weight.from_bnb(packed, state).dequantize()
    theirs = functional.dequantize_4bit(packed.view(-1, 1) if packed.numel() > 1 else packed, state).reshape(shape)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_quantises_to_the_bytes_of_bitsandbytes() -> None:
    dense = torch.randn(48, 80, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = NF4Weight.quantize(dense)
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.absmax_scale is not None and torch.equal(ours.absmax_scale, state.state2.absmax)


def test_goes_to_bitsandbytes_and_back() -> None:
    ours = NF4Weight.quantize(torch.randn(40, 72, generator=torch.Generator().manual_seed(2)))
    again = NF4Weight.from_bnb(*ours.to_bnb())
    assert again.shape == ours.shape and again.dtype == ours.dtype
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in ours.tensors().items())


def test_meta_has_the_layout_of_a_real_weight() -> None:
    real, meta = NF4Weight.quantize(torch.randn(33, 70)), NF4Weight.meta((33, 70))
    assert {n: (t.shape, t.dtype) for n, t in real.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in meta.tensors().items()
    }
    assert meta.nbytes == real.nbytes


def test_refuses_other_quantisations() -> None:
    with pytest.raises(ValueError, match="nf4"):
        NF4Weight.from_bnb(*functional.quantize_4bit(torch.randn(8, 64), blocksize=64, quant_type="fp4"))
