"""A weight matrix in NF4 with double quantisation, in bitsandbytes' layout.

The matrix [N, K] is flattened and cut into blocks of 64 values; a block runs on over row ends. Each value is
one of 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E), times the block's largest magnitude, its *absmax*. Two
levels share a byte, the earlier one in the high nibble. The absmax values are quantised once more (*nested*): minus
their mean (the offset), in blocks of 256, to the 256 levels of a dynamic 8-bit map. That is 4.127 bits a weight.

bitsandbytes does the quantising, so a base is the same bytes here as in QLoRA; reading it back is this project's own
kernel. ``NF4Weight`` is a plain record and not a module with buffers: buffers would be cast by ``model.to(dtype)``, and
an absmax in bf16 is a different base.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa import ops

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


@dataclass
class NF4Weight:
    """One packed weight matrix.

    Attributes:
        codes: uint8 [ceil(N * K / 2)], two 4-bit levels a byte.
        absmax: uint8 [blocks] when nested, else fp32 [blocks].
        absmax_code: fp32 [256], the 8-bit map of nested absmax values; None when not nested.
        absmax_scale: fp32 [ceil(blocks / 256)], largest magnitude of each block of absmax values; None when not nested.
        absmax_offset: fp32 [], mean of the absmax values; None when not nested.
        shape: (N out, K in).
        dtype: What ``dequantize`` gives by default, the dtype that the weight had.
        block_size: Values that share one absmax.
    """

    codes: Tensor
    absmax: Tensor
    absmax_code: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    block_size: int = BLOCK_SIZE

    @classmethod
    def quantize(cls, weight: Tensor, dtype: torch.dtype | None = None) -> NF4Weight:
        """Quantise a dense weight [N, K] (bf16, fp16 or fp32) on its own device."""
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
        )
        quantized = cls.from_bnb(packed, state)
        return dataclasses.replace(quantized, dtype=dtype or weight.dtype)

    @classmethod
    def from_bnb(cls, packed: Tensor, state: QuantState) -> NF4Weight:
        """Take over bitsandbytes' packed tensor and its ``QuantState``, sharing their memory.

        Raises:
            ValueError: Not NF4, not a matrix, or nested in blocks other than 256.
        """
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type must be 'nf4', got {state.quant_type!r}")
        if len(state.shape) != 2:
            raise ValueError(f"expected a matrix, got shape {tuple(state.shape)}")
        shape = (int(state.shape[0]), int(state.shape[1]))
        codes = packed.reshape(-1).view(torch.uint8)
        if not state.nested:
            return cls(codes, state.absmax.float(), None, None, None, shape, state.dtype, state.blocksize)
        if state.state2.blocksize != NESTED_BLOCK_SIZE:
            raise ValueError(f"nested block size must be {NESTED_BLOCK_SIZE}, got {state.state2.blocksize}")
        return cls(
            codes,
            state.absmax,
            state.state2.code.float(),
            state.state2.absmax.float(),
            state.offset.float(),
            shape,
            state.dtype,
            state.blocksize,
        )

    @classmethod
    def meta(cls, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> NF4Weight:
        """The same layout without data, for planning and for models that are filled later."""
        values = shape[0] * shape[1]
        blocks = math.ceil(values / BLOCK_SIZE)

        def empty(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=kind, device="meta")

        return cls(
            codes=empty((math.ceil(values / 2),), torch.uint8),
            absmax=empty((blocks,), torch.uint8),
            absmax_code=empty((256,), torch.float32),
            absmax_scale=empty((math.ceil(blocks / NESTED_BLOCK_SIZE),), torch.float32),
            absmax_offset=empty((), torch.float32),
            shape=shape,
            dtype=dtype,
        )

    def to_bnb(self) -> tuple[Tensor, QuantState]:
        """bitsandbytes' packed tensor [ceil(N * K / 2), 1] and ``QuantState``, sharing this weight's memory."""
        from bitsandbytes import functional

        state2 = None
        if self.absmax_code is not None:
            state2 = functional.QuantState(
                absmax=self.absmax_scale, blocksize=NESTED_BLOCK_SIZE, code=self.absmax_code, dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=functional.get_4bit_type("nf4", device=self.codes.device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.absmax_offset,
            state2=state2,
        )
        return self.codes.view(-1, 1), state

    def operands(self) -> ops.NF4Operands:
        """The tensors in the order that the ops take them."""
        return ops.NF4Operands(
            self.codes, self.absmax, self.absmax_code, self.absmax_scale, self.absmax_offset, self.block_size
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], decoded in fp32 and rounded once to ``dtype``."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        ops.dequant_add(self.operands(), None, out)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by attribute name."""
        names = ("codes", "absmax", "absmax_code", "absmax_scale", "absmax_offset")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; the 1 KiB absmax map is counted though layers may share one."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the packed codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> NF4Weight:
        """A copy on ``device``; dtypes never change."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **moved)
