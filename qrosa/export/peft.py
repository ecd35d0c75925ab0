"""The low-rank part in PEFT's own format, for tools that take a PEFT adapter.

PEFT knows no sparse part, so an adapter that has one is refused unless the caller accepts the loss. Ranks differ by
module here: PEFT takes one rank and exceptions by pattern, and, because it scales each module by ``lora_alpha / r``
as qrosa does, patterns for alpha only where alpha itself differs. Layers without a low-rank part are left out of
``target_modules``; modules are named by their full paths, since a short name would match layers that have none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrosa.adapters.forms import LORA
from qrosa.adapters.inject import quantized_linears
from qrosa.errors import InputError
from qrosa.export.card import write_card
from qrosa.export.folder import check_target, export_folder
from qrosa.export.merge import ExportReport
from qrosa.export.source import card_facts, open_adapter, write_tokenizer
from qrosa.files import write_json, write_tensors

_ROOT = "base_model.model."  # PEFT's wrapper and tuner around the model


def export_peft(
    source: str | Path, output: str | Path, *, model: str | None = None, force: bool = False
) -> ExportReport:
    """Write the low-rank part as a PEFT adapter.

    Args:
        source: A run folder or its adapter folder.
        output: The folder to make; it appears whole or not at all.
        model: Where the base is now, if it has moved since the training.
        force: Replace an earlier export, and leave out a sparse part.

    Raises:
        InputError: No adapter, no low-rank part, or a sparse part that would be lost.
        StorageError: Damaged files, too little disk, or a folder that cannot be written.
    """
    started = time.monotonic()
    check_target(Path(output), force=force)
    opened = open_adapter(source, model)
    layers = quantized_linears(opened.model)
    adapted = {path: layer.low_rank for path, layer in layers.items() if layer.low_rank is not None}
    ranks = {path: part.rank for path, part in adapted.items()}
    nnz = sum(layer.nnz for layer in layers.values())
    if not ranks:
        raise InputError("the adapter has no low-rank part, and PEFT takes nothing else", "use --format safetensors")
    forms = {part.form.name for part in adapted.values()} - {LORA.name}
    if forms:
        raise InputError(f"PEFT's LoRA does not hold a {forms.pop()} adapter", "use --format safetensors")
    if nnz and not force:
        raise InputError(
            f"PEFT's format would lose the sparse part ({nnz:,} values)",
            "use --format safetensors to keep it, or --force to leave it out",
        )
    alphas = {path: part.alpha for path, part in adapted.items()}
    tensors = {}
    for path in adapted:
        part = opened.parts(path).low_rank
        assert part is not None
        for name, factor in zip("AB", part.factors(), strict=True):
            tensors[f"{_ROOT}{path}.lora_{name}.weight"] = factor.detach().contiguous()
    total = sum(tensor.nbytes for tensor in tensors.values())
    with export_folder(Path(output), nbytes=total, force=force, keep=(opened.folder,)) as folder:
        write_tensors(folder / "adapter_model.safetensors", tensors)
        base = str(Path(opened.base_files.source).resolve()) if model else str(opened.config["base"]["source"])
        write_json(folder / "adapter_config.json", peft_config(base, ranks, alphas, opened.config["adapter"]))
        write_tokenizer(opened, folder)
        write_card(folder, card_facts(opened, dtype="bf16", base=""))
        files = sorted(path.name for path in folder.iterdir())
    return ExportReport(str(output), "peft", "bf16", "", len(tensors), total, files, time.monotonic() - started)


def peft_config(
    base: str, ranks: Mapping[str, int], alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``: the commonest rank and alpha, and patterns for the modules that differ.

    Args:
        base: Source of the base.
        ranks: Rank by module path, none of them 0.
        alphas: Scale numerator by module path.
        settings: The adapter's settings, for its dropout.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": float(settings.get("dropout", 0.0)),
        "target_modules": list(ranks),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: _whole(value) for path, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _whole(value: float) -> float | int:
    """PEFT writes alpha as an integer; a fraction stays what it is."""
    return int(value) if value == int(value) else value
