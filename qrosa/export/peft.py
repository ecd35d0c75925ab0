"""An adapter in PEFT's own format, for tools that take one: both parts where there are both.

An adapter without a sparse part becomes a LoRA. Ranks differ by module here: PEFT takes one rank and exceptions by
pattern, and, because it scales each module by ``lora_alpha / r`` as qrosa does, patterns for alpha only where alpha
itself differs. Layers without a low-rank part are left out of ``target_modules``; modules are named by their full
paths, since a short name would match layers that have none. A sparse part makes it a Super-Tuning adapter
(`qrosa.export.supertuning`).

The configs are made and written by PEFT's classes, so that their keys are those of the PEFT that is installed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from qrosa.adapters.forms import LORA
from qrosa.adapters.inject import quantized_linears
from qrosa.errors import InputError, install_hint
from qrosa.export import supertuning
from qrosa.export.card import write_card
from qrosa.export.folder import check_target, export_folder
from qrosa.export.merge import ExportReport
from qrosa.export.shards import Shard, TensorSpec, storage_errors, write_shards
from qrosa.export.source import OpenedAdapter, card_facts, open_adapter, write_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from qrosa.adapters.linear import QRosaLinear

_ROOT = "base_model.model."  # PEFT's wrapper and tuner around the model
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class _Written:
    """What PEFT gets: its config, and tensors that are made when they are written."""

    kind: str
    config: PeftConfig
    specs: list[TensorSpec]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def export_peft(
    source: str | Path, output: str | Path, *, model: str | None = None, force: bool = False
) -> ExportReport:
    """Write the adapter for PEFT.

    A LoRA goes on the base in 4 bits. An adapter with a sparse part goes on the base that ``merge(base_only=True)``
    writes: the sparse part starts at the quantisation's error, which the original weights do not have.

    Args:
        source: A run folder or its adapter folder.
        output: The folder to make; it appears whole or not at all.
        model: Where the base is now, if it has moved since the training.
        force: Replace an earlier export.

    Raises:
        InputError: No adapter, one that PEFT has no form for, or no PEFT that holds it.
        StorageError: Damaged files, too little disk, or a folder that cannot be written.
    """
    started = time.monotonic()
    check_target(Path(output), force=force)
    opened = open_adapter(source, model)
    layers = {path: layer for path, layer in quantized_linears(opened.model).items() if layer.adapter_tensors()}
    forms = {layer.low_rank.form.name for layer in layers.values() if layer.low_rank is not None} - {LORA.name}
    if forms:
        raise InputError(f"PEFT does not hold a {forms.pop()} adapter", "use --format safetensors")
    sparse = any(layer.nnz for layer in layers.values())
    written = _sparse_and_low_rank(opened, layers) if sparse else _lora(opened, layers, model)
    total = sum(spec.nbytes for spec in written.specs)
    with export_folder(Path(output), nbytes=total, force=force, keep=opened.read_from) as folder:
        write_shards(folder, [Shard(_FILE, tuple(written.specs))], written.tensors())
        with storage_errors(folder):
            written.config.save_pretrained(str(folder))
        write_tokenizer(opened, folder)
        write_card(folder, card_facts(opened, dtype=written.kind, base=""))
        files = sorted(path.name for path in folder.iterdir())
    seconds = time.monotonic() - started
    return ExportReport(str(output), "peft", written.kind, "", len(written.specs), total, files, seconds)


def _lora(opened: OpenedAdapter, layers: Mapping[str, QRosaLinear], model: str | None) -> _Written:
    parts = {path: layer.low_rank for path, layer in layers.items() if layer.low_rank is not None}
    base = str(Path(opened.base_files.source).resolve()) if model else str(opened.config["base"]["source"])
    config = lora_config(
        base,
        {path: part.rank for path, part in parts.items()},
        {path: part.alpha for path, part in parts.items()},
        float(opened.config["adapter"].get("dropout", 0.0)),
    )

    def factors(path: str) -> Iterator[tuple[str, Tensor]]:
        part = opened.parts(path).low_rank
        assert part is not None
        for name, factor in zip("AB", part.factors(), strict=True):
            yield f"{_ROOT}{path}.lora_{name}.weight", factor.detach().contiguous()

    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for path in parts for name, value in factors(path)]
    return _Written("bf16", config, specs, lambda: (pair for path in parts for pair in factors(path)))


def lora_config(base: str, ranks: Mapping[str, int], alphas: Mapping[str, float], dropout: float) -> LoraConfig:
    """PEFT's config of a LoRA: the commonest rank and alpha, and patterns for the modules that differ.

    Args:
        base: Source of the base.
        ranks: Rank by module path, none of them 0.
        alphas: Scale numerator by module path.
        dropout: Of the low-rank part.

    Raises:
        InputError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError("--format peft needs PEFT", install_hint("peft")) from None
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: _whole(value) for path, value in alphas.items() if value != alpha},
    )


def _whole(value: float) -> float | int:
    """PEFT writes alpha as an integer; a fraction stays what it is."""
    return int(value) if value == int(value) else value


def _sparse_and_low_rank(opened: OpenedAdapter, layers: Mapping[str, QRosaLinear]) -> _Written:
    shape = supertuning.Shape.of(layers)
    config = supertuning.config(list(layers), shape, float(opened.config["adapter"].get("dropout", 0.0)))
    specs = [
        TensorSpec(f"{_ROOT}{path}.{name}", dtype, size)
        for path, layer in layers.items()
        for name, (dtype, size) in shape.tensors(*layer.weight.shape).items()
    ]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path, layer in layers.items():
            for name, value in shape.padded(opened.parts(path), layer.weight.shape).items():
                yield f"{_ROOT}{path}.{name}", value

    return _Written("fp32", config, specs, tensors)
