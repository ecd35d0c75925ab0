"""The quantisation error R = W - deq(Wq), read off the 16-bit checkpoint one matrix at a time.

R is what 4 bits lost. It is never stored: the 16-bit weights are memory-mapped, one matrix is decoded beside its NF4
form, and what is wanted of the difference (a few positions, a score, a factorisation) is kept. The base is decoded to
fp32 without rounding to 16 bits, because that is the value that training adds S to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrosa.base.base_files import BaseFiles, read_original_weight
from qrosa.base.open import open_base
from qrosa.errors import InputError
from qrosa.quant.nf4 import NF4Weight


def has_original(model: nn.Module) -> bool:
    """Whether 16-bit weights exist that the model's base was quantised from."""
    return str(_info(model).kind) != "nf4"


def checkpoint_of(model: nn.Module) -> BaseFiles:
    """The checkpoint that the model's base was quantised from.

    Raises:
        InputError: The base came quantised, so its error is not known.
    """
    info = _info(model)
    if not has_original(model):
        raise InputError(
            f"{info.source} is already quantised, so its quantisation error is unknown",
            "give the 16-bit checkpoint as --model, or use --mask-score squared",
        )
    return open_base(info.source)


def _info(model: nn.Module) -> Any:
    info = getattr(model, "qrosa_base", None)
    if info is None:
        raise InputError("the model is not a base that qrosa loaded", "load it with qrosa.load")
    return info


@torch.no_grad()
def residual(base_files: BaseFiles, path: str, weight: NF4Weight) -> Tensor:
    """R of one matrix, fp32 [N, K], on the base's device; peak three dense matrices, two of them fp32."""
    decoded = weight.dequantize(torch.float32)
    original = read_original_weight(base_files, path).to(decoded.device)
    if original.shape != decoded.shape:
        raise InputError(
            f"{path} is {tuple(decoded.shape)} in the base but {tuple(original.shape)} in {base_files.source}",
            "use the checkpoint that the base was made from",
        )
    return decoded.neg_().add_(original)
