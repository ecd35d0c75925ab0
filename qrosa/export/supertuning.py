"""Both parts in PEFT's Super-Tuning format: flat positions, their values, and a low-rank pair beside them.

PEFT composes ``W + S`` and adds ``lora_alpha / r * B @ A``, as qrosa does, with one rank and one share of trained
entries for all modules where qrosa's differ. So ranks are padded to the largest with zeros, and each matrix's positions
to the share of the densest: with position 0 and value 0, which add nothing. The scale of each module goes into its B,
in fp32. Positions are int32, 4 bytes, and values fp32: 8 bytes an entry, padded ones too.

PEFT takes dense base layers only. The base must be the one that was trained on, decoded: the sparse part starts at the
quantisation's error, and the config names no base, lest the original's weights are loaded in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrosa.errors import InputError, install_hint

if TYPE_CHECKING:
    from peft import SupertuningConfig

    from qrosa.adapters.inject import AdapterParts
    from qrosa.adapters.linear import QRosaLinear

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_MOST_POSITIONS = 2**31


@dataclass(frozen=True)
class Shape:
    """What all modules have in common in this format.

    Attributes:
        sparsity: Share of a matrix's entries that are not trained.
        rank: Of the low-rank pair, 0 where no module has one.
    """

    sparsity: float
    rank: int

    @classmethod
    def of(cls, layers: Mapping[str, QRosaLinear]) -> Shape:
        """The least common shape that holds every layer's adapter.

        Raises:
            InputError: A matrix has more entries than the format can count.
        """
        wanted = {path: (layer.weight.shape[0] * layer.weight.shape[1], layer.nnz) for path, layer in layers.items()}
        for path, (entries, _) in wanted.items():
            if entries > _MOST_POSITIONS:
                raise InputError(
                    f"{path} has {entries:,} entries, too many for PEFT's format", "use --format safetensors"
                )
        # PEFT refuses a module without any position, so that one that is only low-rank gets one, of value 0.
        sparsity = 1 - max(max(nnz, 1) / entries for entries, nnz in wanted.values())
        step = 2.0**-53
        while any(_positions(entries, sparsity) < max(nnz, 1) for entries, nnz in wanted.values()):
            sparsity, step = sparsity - step, 2 * step  # what rounding took
        return cls(max(sparsity, 0.0), max(layer.rank for layer in layers.values()))

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of the tensors of an [N, K] matrix."""
        count = _positions(rows * columns, self.sparsity)
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        sizes = {_VALUES: (torch.float32, (count,)), _INDICES: (torch.int32, (count,))}
        if self.rank:
            sizes |= {_A: (torch.float32, (self.rank, columns)), _B: (torch.float32, (rows, self.rank))}
        return sizes

    def padded(self, parts: AdapterParts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """One layer's adapter in this shape, on the CPU."""
        made = {name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in self.tensors(*shape).items()}
        if parts.sparse is not None:
            made[_VALUES][: parts.sparse.nnz] = parts.sparse.values.detach()
            made[_INDICES][: parts.sparse.nnz] = parts.sparse.positions().to(torch.int32)
        if parts.low_rank is not None:
            a, b = (factor.detach().float() for factor in parts.low_rank.factors())
            made[_A][: a.shape[0]] = a
            made[_B][:, : b.shape[1]] = b * parts.low_rank.scale
        return made


def _positions(entries: int, sparsity: float) -> int:
    """How many positions PEFT makes room for in a matrix; the rounding is PEFT's."""
    return int(entries * (1 - sparsity))


def config(paths: list[str], shape: Shape, dropout: float) -> SupertuningConfig:
    """PEFT's config of the adapter.

    Args:
        paths: The adapted modules.
        shape: What they have in common.
        dropout: Of the low-rank part.

    Raises:
        InputError: PEFT is not installed, or older than the format.
    """
    try:
        from peft import SupertuningConfig
    except ImportError:
        raise InputError("a sparse part in PEFT's format needs PEFT 0.21 or newer", install_hint("peft")) from None
    low_rank = {"r": shape.rank, "lora_alpha": shape.rank, "lora_dropout": dropout} if shape.rank else {}
    return SupertuningConfig(
        task_type="CAUSAL_LM", inference_mode=True, target_modules=paths, sparsity=shape.sparsity, **low_rank
    )
