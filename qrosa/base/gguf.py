"""A ``.gguf`` file as a base.

The file's blocks (Q4_1, Q8_0, F16, ...) are decoded to fp32 one tensor at a time with the ``gguf`` package and then
quantised to NF4 like any other checkpoint. Names, and the head permutation that llama.cpp applies to some projections,
are undone by transformers' own tables, so every architecture that transformers reads from GGUF works; reading through
``from_pretrained`` itself would hold the whole model in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrosa.base.base_files import BaseFiles
from qrosa.base.build import meta_model
from qrosa.base.checkpoint import check_shape, refuse_missing
from qrosa.base.gguf_file import GGUFFile
from qrosa.base.model_config import model_config
from qrosa.base.structure_source import read_structure
from qrosa.base.weight_files import StoredTensor
from qrosa.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GGUFBase(BaseFiles):
    """One ``.gguf`` model, read tensor by tensor.

    Args:
        source: What the user named.
        file: The opened file.

    Raises:
        InputError: An architecture that transformers does not read, or no decoder.
        StorageError: Tensors of other shapes than the metadata says.
    """

    kind = "gguf"

    def __init__(self, source: str, file: GGUFFile) -> None:
        self.source = source
        self.file = file
        from transformers import AutoConfig
        from transformers import modeling_gguf_pytorch_utils as tables

        try:
            self.config = AutoConfig.from_pretrained(
                file.path.parent, gguf_file=file.path.name, trust_remote_code=False
            )
            # transformers looks at one file, and a split model's head may be in another.
            self.config.tie_word_embeddings = "output.weight" not in file.tensors
            model = meta_model(self.config)
            processor_type = tables.TENSOR_PROCESSORS.get(file.architecture, tables.TensorProcessor)
            self._processor = processor_type(config=self.config.to_dict())  # type: ignore[no-untyped-call]
            names = tables.get_gguf_hf_weights_map(model, self._processor)
        except InputError:
            raise
        except Exception as error:  # unknown architectures surface as ValueError, KeyError or NotImplementedError
            raise InputError(
                f"{source} cannot be used: {first_line(error)}",
                "use a GGUF file of an architecture transformers can read",
            ) from None
        self.structure = read_structure(model_config(self.config.to_dict(), source), source)
        self._tensors = {name: file.tensors[theirs] for theirs, name in names.items() if theirs in file.tensors}
        extra = sorted(file.tensors.keys() - names.keys())
        refuse_missing(source, self.structure.shapes, self._tensors, extra)
        for name, shape in self.structure.shapes.items():
            check_shape(source, name, self.shape(name), shape)
        left = f"{len(extra)} tensors that the model has no place for are left out: {', '.join(extra[:3])}"
        self.notes = (left,) if extra else ()

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

    def stored(self, name: str) -> StoredTensor:
        """A tensor's blocks in the file."""
        tensor = self._tensors[name]
        place, size = int(tensor.data_offset), int(tensor.n_bytes)
        part = self.file.parts[tensor.name]
        return StoredTensor(part, tensor.name, tensor.tensor_type.name, self.shape(name), place, size)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored in the file."""
        from transformers import AutoTokenizer

        path = self.file.path
        try:
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # tokenizers raise whatever their parser met
            raise InputError(
                f"the tokenizer in {self.source} cannot be used: {first_line(error)}",
                "use the model's safetensors folder",
            ) from None
