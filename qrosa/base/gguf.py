"""A ``.gguf`` file as a base.

The file's blocks (Q4_1, Q8_0, F16, ...) are decoded to fp32 one tensor at a time with the ``gguf`` package and then
quantised to NF4 like any other checkpoint. Names, and the head permutation that llama.cpp applies to some projections,
are undone by transformers' own tables, so every architecture that transformers reads from GGUF works; reading through
``from_pretrained`` itself would hold the whole model in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa.base.base_files import BaseFiles, first_line
from qrosa.errors import InputError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GGUFBase(BaseFiles):
    """One ``.gguf`` file, read tensor by tensor."""

    kind = "gguf"

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self.path = path
        self._reader = _open(source, path)
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as tables

        try:
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # unknown architectures surface as ValueError or KeyError
            raise InputError(
                f"{source} cannot be used: {first_line(error)}",
                "use a GGUF file of an architecture transformers can read",
            ) from None
        architecture = tables.read_field(self._reader, "general.architecture")[0]
        processor_type = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)
        self._processor = processor_type(config=self.config.to_dict())  # type: ignore[no-untyped-call]
        names = tables.get_gguf_hf_weights_map(model, self._processor)
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._tensors = {name: stored[theirs] for theirs, name in names.items() if theirs in stored}

    def names(self) -> list[str]:
        """Names of the transformers model's tensors that the file holds."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order (GGUF lists dimensions innermost first)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """One tensor, decoded to fp32."""
        import gguf

        stored = self._tensors[name]
        weights = gguf.dequantize(stored.data, stored.tensor_type)
        processed = self._processor.process(
            weights=weights, name=stored.name, tensor_key_mapping={stored.name: name}, parsed_parameters={"tensors": {}}
        )
        return torch.from_numpy(processed.weights.copy())

    def sample(self, name: str) -> bytes:
        """Type, shape and three samples of the stored blocks."""
        stored = self._tensors[name]
        flat = stored.data.reshape(-1).view("uint8")
        middle = flat.size // 2
        pieces = (flat[:1024], flat[max(0, middle - 512) : middle + 512], flat[-1024:])
        return f"{int(stored.tensor_type)}{self.shape(name)}".encode() + b"".join(piece.tobytes() for piece in pieces)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored in the file."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)
        except Exception as error:  # tokenizers raise whatever their parser met
            raise InputError(
                f"the tokenizer in {self.source} cannot be used: {first_line(error)}",
                "use the model's safetensors folder",
            ) from None


def _open(source: str, path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"model file {source} does not exist", "check the path given to --model")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("reading .gguf files needs the gguf package", "pip install 'qrosa[gguf]'") from None
    try:
        return GGUFReader(path)
    except PermissionError:
        raise StorageError(f"{source} cannot be read", "check the file's permissions") from None
    except Exception as error:  # the reader trusts the file and fails in many ways on a damaged one
        raise StorageError(
            f"{source} is not a sound GGUF file: {first_line(error)}", "download the file again"
        ) from None
