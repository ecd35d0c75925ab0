"""A base on disk, whatever its format, as one thing: named tensors that are read one at a time.

Three kinds: ``dense`` (a folder of bf16, fp16 or fp32 safetensors), ``nf4`` (the same, already quantised by
bitsandbytes) and ``gguf`` (one file, its blocks decoded tensor by tensor). Names are always those of the transformers
model, so that loading, mask repair and export walk the same list and none of them holds more than one 16-bit tensor.

A base is recognised again by its *fingerprint*: a hash over each tensor's name, dtype, shape and bytes, and over the
config's values that change what the tensors compute. It tells fine-tuned variants apart and does not depend on how the
tensors are sharded.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa.base.checkpoint import Checkpoint
from qrosa.base.digests import tensor_digests
from qrosa.base.library_config import config_value, make_config
from qrosa.base.structure import Structure
from qrosa.base.tokenizer import load_tokenizer
from qrosa.base.weight_files import StoredTensor
from qrosa.errors import InputError, StorageError
from qrosa.files import read_json
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Config values that change what a model computes without changing a tensor.
_COMPUTING_KEYS = (
    "model_type", "hidden_act", "hidden_activation", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_parameters", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "tie_word_embeddings",
)  # fmt: skip


class BaseFiles(ABC):
    """One base, opened but not loaded.

    Attributes:
        source: What the user named.
        kind: ``dense``, ``nf4`` or ``gguf``.
        config: The transformers config of the text model, without any quantisation entry.
        structure: The model's tensors, all of which were found, in the right shapes.
        notes: What a reader may not expect of how the base is read, a sentence each.
    """

    source: str
    kind: str
    config: PretrainedConfig
    structure: Structure
    notes: tuple[str, ...]

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
    def stored(self, name: str) -> StoredTensor:
        """A tensor as it lies in its file."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that comes with the base."""

    def generation_config(self) -> dict[str, Any] | None:
        """The base's generation defaults, or None when it has none."""
        return None

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key in _COMPUTING_KEYS:
            digest.update(f"{key}={config_value(self.config, key)!r}\0".encode())
        tensors = {name: self.stored(name) for name in sorted(self.names())}
        digests = tensor_digests(tensors.values())
        for name, tensor in tensors.items():
            digest.update(f"{name}\0{tensor.dtype}{tensor.shape}{digests[tensor]}".encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hex digest that tells this base from any other."""
        return self._fingerprint


class SafetensorsBase(BaseFiles):
    """A folder with config.json and safetensors files, sharded or not, dense or quantised by bitsandbytes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.source, self.folder, self.kind = checkpoint.source, checkpoint.folder, checkpoint.kind
        self.structure, self.notes = checkpoint.structure, checkpoint.notes
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors
        self.config = text_model_config(checkpoint)

    def names(self) -> list[str]:
        """Tensor names as the transformers model has them; companions of NF4 weights are listed too."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, [N, K] for an NF4 weight."""
        return self._checkpoint.shape(name)

    def read(self, name: str) -> Tensor:
        """One tensor: copied out of the memory-mapped file, or decoded to fp32 where it is stored in NF4."""
        if name in self._checkpoint.packed:
            return self.read_nf4(name.removesuffix(".weight")).dequantize(torch.float32)
        tensor = self._stored(name)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def _stored(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        stored = self._tensors[name]
        try:
            with safe_open(stored.path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(stored.name)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{stored.path} cannot be read: {error}", "copy or download the file again") from None
        return tensor

    def is_nf4(self, path: str) -> bool:
        """Whether the weight of the module at ``path`` is stored in NF4."""
        return f"{path}.weight" in self._checkpoint.packed

    def read_nf4(self, path: str) -> NF4Weight:
        """The packed weight of the module at ``path``, as bitsandbytes saved it.

        Raises:
            StorageError: Its parts are missing or do not fit together.
        """
        from bitsandbytes.functional import QuantState

        prefix = f"{path}.weight"
        try:
            parts = {name: self._stored(name) for name in self._tensors if name.startswith(f"{prefix}.")}
            return NF4Weight.from_bnb(self._stored(prefix), QuantState.from_dict(parts, device=torch.device("cpu")))
        except (KeyError, ValueError, AssertionError) as error:
            raise StorageError(
                f"the quantised weight {prefix} of {self.source} is damaged: {error}", "download the checkpoint again"
            ) from None

    def stored(self, name: str) -> StoredTensor:
        """A tensor in one of the safetensors files."""
        return self._tensors[name]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        return load_tokenizer(self.source, self.folder)

    def generation_config(self) -> dict[str, Any] | None:
        """The folder's generation_config.json, if there is one."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else None


def text_model_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """transformers' config of a checkpoint's text model, the head tied as it turned out."""
    config = make_config(checkpoint.config.text, checkpoint.source)
    config.tie_word_embeddings = checkpoint.structure.dims.tied
    config.name_or_path = str(checkpoint.folder)
    return config


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
