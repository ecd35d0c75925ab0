"""Adapters of a loaded model: putting them on by budget, saving them, loading them, and loading a finished run.

An adapter belongs to one base. Its config names the base's fingerprint, and it loads on no other: merged into or
run on a different base, an adapter silently gives a worse model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qrosa.adapters.budget import Allocation, allocate
from qrosa.adapters.forms import form_named
from qrosa.adapters.frozen import watch_for_frozen
from qrosa.adapters.inject import (
    adapter_state,
    inject_low_rank,
    linear_shapes,
    load_adapter_state,
    quantized_linears,
    trainable_parameters,
)
from qrosa.base.load import Progress, base_info, load_base
from qrosa.base.open import open_base
from qrosa.base.saving import SavesAdapter
from qrosa.base.speech import Speech
from qrosa.config import AdapterConfig, make_group
from qrosa.errors import InputError, StorageError
from qrosa.sparse.store import ADAPTER_FILE, BESIDE, CONFIG_FILE, read_adapter, read_adapter_config, write_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach_adapter(
    model: PreTrainedModel, config: AdapterConfig, seed: int = 42, allocation: Allocation | None = None
) -> Allocation:
    """Split the budget over the model's layers and add the low-rank part.

    The sparse part's positions come from mask selection; how many each matrix gets is in the returned allocation,
    which is also kept as ``model.qrosa_allocation``.

    Args:
        model: A loaded base.
        config: The budget and its split.
        seed: Source of the low-rank part's initial values.
        allocation: The split, where it is already known; default from the budget.

    Raises:
        InputError: A budget that cannot be met, or ranks that are to follow sensitivities nobody has measured.
    """
    if allocation is None:
        refuse_unmeasured(config)
        allocation = allocate(config, linear_shapes(model), base_info(model).parameters)
    inject_low_rank(model, allocation.ranks, config.alpha, config.dropout, seed, form_named(allocation.form))
    model.qrosa_adapter = config  # type: ignore[assignment]
    model.qrosa_allocation = allocation  # type: ignore[assignment]
    model.save_pretrained = SavesAdapter(model, save_adapter)  # type: ignore[assignment]
    watch_for_frozen(model)
    return allocation


def refuse_unmeasured(config: AdapterConfig) -> None:
    """Refuse settings that need rows where there are none.

    Raises:
        InputError: Ranks are to be given by sensitivity.
    """
    if config.rank_by == "sensitivity":
        raise InputError(
            "ranks by sensitivity are measured on training rows, and there are none here",
            "leave rank_by at 'order', or train with qrosa finetune --rank-by sensitivity",
        )


def save_adapter(model: nn.Module, folder: str | Path, *, beside_base: bool = False) -> None:
    """Write the model's low-rank and sparse part to ``folder`` (``adapter.safetensors``, ``adapter_config.json``).

    Args:
        model: A model with an adapter.
        folder: Made if it is not there.
        beside_base: The folder lies in the base's own, and the two are moved and copied together.

    Raises:
        InputError: The model has no adapter.
        StorageError: The folder cannot be written.
    """
    state = adapter_state(model)
    if not state:
        raise InputError("the model has no adapter to save", "load it with an AdapterConfig, or fine-tune it first")
    config = adapter_config(model)
    if beside_base:
        config["base"]["source"] = BESIDE
    write_adapter(folder, state, config)


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """What ``adapter_config.json`` says of the model's adapter."""
    layers = {path: layer for path, layer in quantized_linears(model).items() if layer.adapter_parameters()}
    settings: AdapterConfig | None = getattr(model, "qrosa_adapter", None)
    speech: Speech = getattr(model, "qrosa_speech", Speech())
    base = dataclasses.asdict(base_info(model))
    if Path(base["source"]).expanduser().exists():
        base["source"] = str(Path(base["source"]).expanduser().resolve())  # found again from any working directory
    return {
        "base": base,
        "adapter": dataclasses.asdict(settings) if settings else {},
        "modules": {
            path: {"rank": layer.rank, "alpha": layer.alpha, "nnz": layer.nnz, "shape": list(layer.weight.shape)}
            for path, layer in layers.items()
        },
        "trainable": sum(parameter.numel() for parameter in trainable_parameters(model)),
        **speech.to_config(),
    }


def adapter_alpha(model: nn.Module) -> float:
    """The scale numerator that the model's adapter was made with."""
    settings: AdapterConfig | None = getattr(model, "qrosa_adapter", None)
    return AdapterConfig.alpha if settings is None else settings.alpha


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put a saved adapter on the base that it was trained on.

    Raises:
        InputError: No adapter there, or one of another base.
        StorageError: Damaged files.
    """
    tensors, config = read_adapter(adapter_folder(folder))
    expected, found = config["base"].get("fingerprint"), base_info(model).fingerprint
    if expected != found:
        raise InputError(
            f"the adapter in {folder} was trained on another base ({config['base'].get('source')}, "
            f"fingerprint {str(expected)[:12]}; this one is {found[:12]})",
            "use the base that the adapter was trained on",
        )
    settings = _settings(folder, config["adapter"])
    alphas = {path: float(module["alpha"]) for path, module in config["modules"].items()}
    load_adapter_state(model, tensors, alphas, settings.dropout if settings else 0.0)
    if settings:
        model.qrosa_adapter = settings  # type: ignore[assignment]
    model.save_pretrained = SavesAdapter(model, save_adapter)  # type: ignore[assignment]
    set_speech(model, Speech.of(config))


def _settings(folder: str | Path, values: dict[str, Any]) -> AdapterConfig | None:
    """The settings that an adapter was made with; None where it does not say."""
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    try:
        if not values.keys() <= known:
            raise InputError("unknown settings", "")
        return make_group(AdapterConfig, values) if values else None
    except InputError as error:
        raise StorageError(
            f"the settings of the adapter in {folder} do not add up: {error.message}", "copy the adapter folder again"
        ) from None


def set_speech(model: nn.Module, speech: Speech) -> None:
    """Let a model stop at the tokens that it has learnt to end with; what is saved of it says so too."""
    model.qrosa_speech = speech  # type: ignore[assignment]
    speech.end(cast("PreTrainedModel", model))


def adapter_folder(source: str | Path) -> Path:
    """The adapter's folder, given it or the run that it belongs to.

    Raises:
        InputError: There is no adapter.
    """
    folder = Path(source)
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG_FILE).is_file() and (candidate / ADAPTER_FILE).is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        raise InputError(
            f"run {source} is not finished: it has no adapter yet",
            f"go on with: qrosa finetune --resume --output {source}",
        )
    raise InputError(f"{source} holds no adapter", "give a run folder or its adapter/ folder")


def is_run_or_adapter(source: str | Path) -> bool:
    """Whether ``source`` is a run or adapter folder and not a model."""
    folder = Path(source)
    return ((folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()) or (
        folder.is_dir() and ((folder / "adapter").is_dir() or (folder / "checkpoints").is_dir())
    )


def base_source(folder: str | Path) -> str:
    """The base that an adapter names: an absolute path or a hub id."""
    return str(read_adapter_config(folder)["base"].get("source", ""))


def load_run_or_model(
    source: str, device: torch.device | str = "cpu", progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path | None]:
    """Load a run (its base and adapter), an adapter folder, or a bare model.

    Returns:
        The model in eval mode, the tokenizer, and the adapter's folder (None for a bare model).

    Raises:
        InputError: Nothing that can be loaded, or the base is gone or has changed.
        StorageError: Damaged files.
    """
    if not is_run_or_adapter(source):
        model, tokenizer = load_base(source, device, progress=progress)
        return model, tokenizer, None
    folder = adapter_folder(source)
    model, tokenizer = load_base(open_base(base_source(folder)), device, progress=progress)
    load_adapter(model, folder)
    return model.eval(), Speech.of(read_adapter_config(folder)).put_on(tokenizer), folder
