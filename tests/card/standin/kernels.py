"""How the card's kernels differ from the CPU's that stand in for them: which refuse determinism, and which lack it.

Sources: torch's documentation of ``use_deterministic_algorithms`` for the operations that raise; for attention
``aten/src/ATen/native/transformers/cuda/attention_backward.cu``, which takes its deterministic way only where
determinism is strict (``warn_only=False``); for cuBLAS ``alertCuBLASConfigNotDeterministic``.
"""

from __future__ import annotations

import os
import random
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
REFUSES = {
    _aten.kthvalue.default,
    _aten.histc.default,
    _aten.put_.default,
    _aten._adaptive_avg_pool2d_backward.default,
}
REFUSES_FLOATS = {_aten.cumsum.default, _aten.cumsum_.default}
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.addmm_.default, _aten.bmm.default, _aten.mm.out}
ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_noise = random.Random()  # as unlike from run to run as the order of a card's atomic sums


def check_determinism(func: Any, args: tuple[Any, ...]) -> None:
    """Refuse what a card refuses where determinism is strict.

    Raises:
        RuntimeError: The operation has no deterministic kernel, or cuBLAS was not told to be deterministic.
    """
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        return
    if func in REFUSES or (func in REFUSES_FLOATS and args[0].is_floating_point()):
        raise RuntimeError(f"{func} does not have a deterministic implementation")
    if func in PRODUCTS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise RuntimeError("Deterministic behavior was enabled, but cuBLAS is not: set CUBLAS_WORKSPACE_CONFIG")


def disturbed(func: Any, result: Any) -> Any:
    """The result, in another rounding each time where the kernel that a card takes sums in any order."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if func is ATTENTION_BACKWARD and not strict:
        query: Tensor = result[0]
        query.mul_(1.0 + 2.0**-6 * _noise.random())
    return result
