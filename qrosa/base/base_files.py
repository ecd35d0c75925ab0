"""A base on disk, whatever its format, as one thing: named tensors that are read one at a time.

Three kinds: ``dense`` (a folder of bf16, fp16 or fp32 safetensors), ``nf4`` (the same, already quantised by
bitsandbytes) and ``gguf`` (one file, its blocks decoded tensor by tensor). Names are always those of the transformers
model, so that loading, mask repair and export walk the same list and none of them holds more than one 16-bit tensor.

A base is recognised again by its *fingerprint*: a hash over each tensor's name, dtype, shape and three samples of its
bytes, and over the config's values that change what the tensors compute. It tells fine-tuned variants apart, does not
depend on how the tensors are sharded, and costs a second on a 70B folder where a hash of all bytes would cost minutes.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa.base.tokenizer import load_tokenizer
from qrosa.errors import InputError, StorageError
from qrosa.files import read_json, read_safetensors_header
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SAMPLE = 1024  # bytes hashed at the start, middle and end of each tensor
# Config values that change what a model computes without changing a tensor.
_COMPUTING_KEYS = (
    "model_type", "hidden_act", "hidden_activation", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_parameters", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "tie_word_embeddings",
)  # fmt: skip
# Multimodal checkpoints keep their text model under a prefix; the text model alone is what is fine-tuned.
_TEXT_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", ""))


class BaseFiles(ABC):
    """One base, opened but not loaded.

    Attributes:
        source: What the user named.
        kind: ``dense``, ``nf4`` or ``gguf``.
        config: The transformers config of the text model, without any quantisation entry.
    """

    source: str
    kind: str
    config: PretrainedConfig

    @abstractmethod
    def names(self) -> list[str]:
        """Tensor names as the transformers model has them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as ``read`` gives it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, dense, on the CPU, in the dtype that it is stored in (fp32 for GGUF blocks)."""

    @abstractmethod
    def sample(self, name: str) -> bytes:
        """A description and some bytes of a tensor's stored form, for the fingerprint."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that comes with the base."""

    def generation_config(self) -> dict[str, Any] | None:
        """The base's generation defaults, or None when it has none."""
        return None

    def require(self, name: str) -> None:
        """Check that a tensor is there.

        Raises:
            InputError: It is not.
        """
        if name not in self.names():
            raise InputError(
                f"{self.source} has no tensor {name!r}",
                "the checkpoint does not match its config.json; download it again",
            )

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key in _COMPUTING_KEYS:
            digest.update(f"{key}={getattr(self.config, key, None)!r}\0".encode())
        for name in sorted(self.names()):
            digest.update(name.encode() + b"\0" + self.sample(name))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hex digest that tells this base from any other."""
        return self._fingerprint


class SafetensorsBase(BaseFiles):
    """A folder with config.json and safetensors files, sharded or not, dense or quantised by bitsandbytes."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source = source
        self.folder = folder
        self._tensors: dict[str, tuple[Path, str]] = {}
        self._headers: dict[Path, Any] = {}
        for path in _safetensors_files(source, folder):
            header, offset = read_safetensors_header(path)
            self._headers[path] = (header, offset)
            self._tensors.update({_text_name(stored): (path, stored) for stored in header})
        self.config = _text_config(source, folder)
        quantization = getattr(self.config, "quantization_config", None)
        self.kind = _kind(source, quantization, self._tensors)
        if quantization is not None:
            del self.config.quantization_config

    def names(self) -> list[str]:
        """Tensor names as the transformers model has them; companions of NF4 weights are listed too."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor (of the packed bytes, for an NF4 weight)."""
        return self._entry(name)[1]

    def read(self, name: str) -> Tensor:
        """One stored tensor, copied out of the memory-mapped file."""
        from safetensors import SafetensorError, safe_open

        path, stored = self._tensors[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path} cannot be read: {error}", "copy or download the file again") from None
        return tensor

    def is_nf4(self, path: str) -> bool:
        """Whether the weight of the module at ``path`` is stored in NF4."""
        return f"{path}.weight.quant_state.bitsandbytes__nf4" in self._tensors

    def read_nf4(self, path: str) -> NF4Weight:
        """The packed weight of the module at ``path``, as bitsandbytes saved it.

        Raises:
            StorageError: Its parts are missing or do not fit together.
        """
        from bitsandbytes.functional import QuantState

        prefix = f"{path}.weight"
        try:
            parts = {name: self.read(name) for name in self._tensors if name.startswith(f"{prefix}.")}
            return NF4Weight.from_bnb(self.read(prefix), QuantState.from_dict(parts, device=torch.device("cpu")))
        except (KeyError, ValueError, AssertionError) as error:
            raise StorageError(
                f"the quantised weight {prefix} of {self.source} is damaged: {error}", "download the checkpoint again"
            ) from None

    def sample(self, name: str) -> bytes:
        """Dtype, shape and three samples of the stored bytes."""
        path, _ = self._tensors[name]
        dtype, shape, (first, end) = self._entry(name)
        start, size = self._headers[path][1] + first, end - first
        with open(path, "rb") as file:
            pieces = [f"{dtype}{shape}".encode()]
            for position in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
                file.seek(start + position)
                pieces.append(file.read(min(_SAMPLE, size)))
        return b"".join(pieces)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        return load_tokenizer(self.source, self.folder)

    def generation_config(self) -> dict[str, Any] | None:
        """The folder's generation_config.json, if there is one."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        path, stored = self._tensors[name]
        entry: tuple[str, tuple[int, ...], tuple[int, int]] = self._headers[path][0][stored]
        return entry


def read_original_weight(base_files: BaseFiles, path: str) -> Tensor:
    """The 16-bit weight [N, K] of the module at ``path``, for repair and for merging into the original.

    Raises:
        InputError: The base was quantised before qrosa saw it, so there is no original.
    """
    if base_files.kind == "nf4":
        raise InputError(
            f"{base_files.source} is already quantised: its 16-bit weights are not known", "use the 16-bit checkpoint"
        )
    return base_files.read(f"{path}.weight")


def _safetensors_files(source: str, folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index, or the single one."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{source} has no config.json", "give the folder of a Hugging Face model")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise StorageError(f"{index} has no weight map", "download the file again")
        if any(os.path.basename(name) != name for name in weight_map.values()):
            raise StorageError(f"{index} points outside its folder", "do not use this checkpoint")
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "convert it to safetensors first: pickled weights can run code and are not read"
        raise InputError(f"{source} has no .safetensors files", hint if pickles else "download the model's weights too")
    return files


def _text_config(source: str, folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # unknown architectures surface as ValueError, KeyError or strict-dataclass errors
        raise InputError(
            f"the config.json of {source} is not understood: {first_line(error)}",
            "use a decoder-only model that this version of transformers knows",
        ) from None
    text = getattr(config, "text_config", None)
    chosen: PretrainedConfig = config if text is None else text
    return chosen


def _kind(source: str, quantization: Any, tensors: dict[str, tuple[Path, str]]) -> str:
    """``dense`` or ``nf4``; other quantisations cannot be trained on."""
    if any(name.endswith(".quant_state.bitsandbytes__nf4") for name in tensors):
        return "nf4"
    if quantization is None:
        return "dense"
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method", "an unknown method")
    raise InputError(
        f"{source} is quantised with {getattr(method, 'value', method)}, which cannot be a base",
        "use the 16-bit checkpoint, or one quantised to NF4 by bitsandbytes",
    )


def _text_name(stored: str) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored.removeprefix(prefix)
    return stored


def first_line(error: Exception) -> str:
    """The first line of a library's error text, for errors that are one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
