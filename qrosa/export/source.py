"""What is exported: an adapter and the base that it belongs to, checked against each other before anything is written.

The base's weights stay on disk. Its fingerprint must be the one that the adapter was trained on; an empty model on the
meta device gives the names and shapes, and takes the adapter's tensors on trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from qrosa.adapters.inject import AdapterParts, load_adapter_state, saved_names, saved_parts
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.adapter_io import adapter_folder, is_run_or_adapter
from qrosa.base.base_files import BaseFiles, SafetensorsBase
from qrosa.base.build import empty_model
from qrosa.base.open import open_base
from qrosa.base.speech import Speech
from qrosa.errors import InputError
from qrosa.export.card import Facts
from qrosa.export.shards import storage_errors
from qrosa.files import read_json
from qrosa.sparse.store import read_adapter, read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter checked against its base.

    Attributes:
        folder: Where the adapter is; None for a base without one.
        base_files: The base that it was trained on.
        model: The model's structure on the meta device, with the adapter's shapes and scales in place.
        tensors: The adapter's tensors by name.
        config: The adapter's config.
    """

    folder: Path | None
    base_files: BaseFiles
    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @property
    def read_from(self) -> tuple[Path, ...]:
        """The folders that are read beside the base's."""
        return () if self.folder is None else (self.folder,)

    @property
    def speech(self) -> Speech:
        """How the trained model is asked, and how its answers end."""
        return Speech.of(self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with the chat template that was trained with."""
        return self.speech.put_on(self.base_files.tokenizer())

    @cached_property
    def _names(self) -> dict[str, str]:
        return saved_names(self.model)

    def parts(self, path: str) -> AdapterParts:
        """The adapter of the layer at ``path``, on the CPU."""
        layer = cast(QRosaLinear, self.model.get_submodule(path))
        own = {name: self.tensors[self._names[f"{path}.{name}"]] for name in layer.adapter_tensors()}
        return saved_parts(path, own, layer.weight.shape, layer.alpha)


def open_adapter(source: str | Path, model: str | None = None) -> OpenedAdapter:
    """Open an adapter and its base, and check that they belong together, without reading a weight of the base.

    Args:
        source: A run folder or its adapter folder.
        model: Where the base is now; None is where it was.

    Raises:
        InputError: No adapter, no base, another base than the one trained on, or tensors that do not fit it.
        StorageError: Damaged files.
    """
    folder = adapter_folder(source)
    tensors, config = read_adapter(folder)
    base_files = _own_base(folder, config, model)
    structure = empty_model(base_files.config)
    alphas = {path: float(module["alpha"]) for path, module in config["modules"].items()}
    load_adapter_state(structure, tensors, alphas)
    return OpenedAdapter(folder, base_files, structure, tensors, config)


def open_bare(source: str | Path, model: str | None = None) -> OpenedAdapter:
    """Open a base as if it had an adapter that holds nothing.

    Args:
        source: A run, an adapter's folder, or the base itself.
        model: Where a run's base is now; None is where it was.

    Raises:
        InputError: No base, or another one than the run's.
        StorageError: Damaged files.
    """
    if is_run_or_adapter(source):
        folder = adapter_folder(source)
        base_files = _own_base(folder, read_adapter_config(folder), model)
    elif model is not None:
        raise InputError(f"{source} is a base itself, so --model says nothing more", "leave out --model")
    else:
        base_files = open_base(str(source))
    config: dict[str, Any] = {"base": {"source": base_files.source}, "adapter": {}, "modules": {}}
    return OpenedAdapter(None, base_files, empty_model(base_files.config), {}, config)


def _own_base(folder: Path, config: Mapping[str, Any], model: str | None) -> BaseFiles:
    """The base of an adapter, by its fingerprint.

    Raises:
        InputError: It is not there, or is another one.
        StorageError: Damaged files.
    """
    base_files = open_adapter_base(folder, str(config["base"].get("source", "")), model)
    expected, found = str(config["base"].get("fingerprint")), base_files.fingerprint()
    if expected != found:
        raise InputError(
            f"the adapter in {folder} was trained on another base (fingerprint {expected[:12]}; that of "
            f"{base_files.source} is {found[:12]})",
            "give the base that it was trained on with --model",
        )
    return base_files


def open_adapter_base(folder: Path, source: str, model: str | None = None) -> BaseFiles:
    """The base of an adapter.

    Args:
        folder: The adapter's folder, for messages.
        source: Where the base was when the adapter was trained.
        model: Where it is now; None is where it was.

    Raises:
        InputError: It is not there.
        StorageError: Damaged files.
    """
    if model is not None:
        return open_base(model)
    try:
        return open_base(source)
    except InputError as error:
        raise InputError(
            f"the base of the adapter in {folder} cannot be opened: {error.message}",
            "if it has moved, say where it is with --model",
        ) from error


def original_folder(opened: OpenedAdapter) -> Path | None:
    """The folder of the 16-bit model that the base was made of; None where it is not at hand as safetensors.

    A base of ``qrosa quantize`` names it in its report.
    """
    base_files, made = opened.base_files, _made(opened)
    if made is not None:
        try:
            base_files = open_base(str(made["model"]))
        except InputError:
            return None
        if base_files.fingerprint() != made["base"]:
            return None
    return base_files.folder if isinstance(base_files, SafetensorsBase) and base_files.kind == "dense" else None


def _made(opened: OpenedAdapter) -> Mapping[str, Any] | None:
    """The report of a base that ``qrosa quantize`` made; None for other bases."""
    base_files = opened.base_files
    if not isinstance(base_files, SafetensorsBase) or base_files.kind != "nf4":
        return None
    report = base_files.folder / "report.json"
    made = read_json(report) if report.is_file() else {}
    return made if "base" in made and "model" in made else None


def card_facts(opened: OpenedAdapter, *, dtype: str, base: str, form: str = "safetensors") -> Facts:
    """What the model card tells about how the export was made."""
    config = opened.config
    ranks = [int(module.get("rank", 0)) for module in config["modules"].values()]
    made = _made(opened)
    return Facts(
        base=str(config["base"].get("source", "")),
        fingerprint=opened.base_files.fingerprint(),
        kind=opened.base_files.kind,
        budget=config["adapter"].get("budget"),
        trainable=int(config.get("trainable", 0)),
        parameters=int(config["base"].get("parameters", 0)),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        nnz=sum(int(module.get("nnz", 0)) for module in config["modules"].values()),
        dtype=dtype,
        merged_into=base,
        form=form,
        made_of=None if made is None else str(made["model"]),
    )


def write_tokenizer(opened: OpenedAdapter, folder: Path) -> None:
    """Save the tokenizer, with the chat template that was trained with.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storage_errors(folder):
        opened.tokenizer().save_pretrained(folder)
