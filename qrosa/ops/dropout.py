"""Dropout by a counter-based hash: element i is dropped when hash(seed, i) falls below p * 2^32.

Drawing a mask again in backward must be cheap and exact. PyTorch's CPU generator is sequential (some 5 ms for a
[512, 2048] input, a third of the layer), so the mask is a pure function of the seed and the element's index instead,
the same on every device and for every number of threads. The hash is murmur3's 32-bit finaliser with two keys derived
from the seed; ``csrc/dropout.h`` holds the same function for the kernels. Indices wrap at 2^32.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF


def keys(seed: int) -> tuple[int, int]:
    """Two 32-bit keys from a seed: one round of splitmix64."""
    state = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    state ^= state >> 31
    return state & _WORD, state >> 32


def threshold(p: float) -> int:
    """Hashes below this are dropped."""
    return int(p * 2.0**32)


def keep_mask(count: int, p: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which of ``count`` elements stay, bool [count]."""
    first, second = keys(seed)
    hashed = (torch.arange(count, dtype=torch.int64, device=device) & _WORD) ^ first
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B + second) & _WORD
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _WORD
    return (hashed ^ (hashed >> 16)) >= threshold(p)


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x with dropped elements zero and the others multiplied by 1 / (1 - p), contiguous, in x's dtype."""
    torch._check(0.0 <= p < 1.0, lambda: f"dropout must be in [0, 1), got {p}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(1.0 / (1.0 - p), dtype=wide, device=x.device)
    keep = keep_mask(x.numel(), p, seed, x.device).view(x.shape)
    return torch.where(keep, x.to(wide) * scale, 0.0).to(x.dtype).contiguous()
