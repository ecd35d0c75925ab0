"""A merged model as one ``.gguf`` file, for llama.cpp and what is built on it.

The weights are those of `qrosa.export.merge`, streamed as there: every name, type and size is known before the first
tensor is made, so the ``gguf`` package writes the header first and then one tensor at a time. Matrices are fp16 or
Q8_0 (blocks of 32 along the row; a matrix whose rows do not divide stays fp16); vectors are fp32, as llama.cpp wants
them. Names are the package's own table of transformers' names.

llama.cpp rotates pairs of neighbours in Llama's queries and keys where transformers rotates halves, so their rows are
put in another order; Gemma's norms multiply by 1 + weight, and the file holds the sum.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa.errors import InputError, install_hint
from qrosa.export.card import write_card
from qrosa.export.folder import GGUF_FILE, MODELFILE, check_target, export_folder
from qrosa.export.gguf_metadata import ARCHITECTURES, add_metadata, rope_factors
from qrosa.export.gguf_tokenizer import add_tokenizer, end_texts
from qrosa.export.merge import ExportReport, check_original, counted, merged_specs, merged_tensors
from qrosa.export.shards import TensorSpec, storage_errors
from qrosa.export.source import OpenedAdapter, card_facts, open_adapter
from qrosa.files import write_text

if TYPE_CHECKING:
    from gguf import GGUFWriter

QUANTS = ("f16", "q8_0")
_BLOCK, _BLOCK_BYTES = 32, 34  # of Q8_0: 32 int8 and an fp16 scale


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file and the merged model's tensor that it is made of."""

    name: str
    spec: TensorSpec
    quantised: bool

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.spec.nbytes // 4 // _BLOCK * _BLOCK_BYTES if self.quantised else self.spec.nbytes


def export_gguf(
    source: str | Path,
    output: str | Path,
    *,
    quant: str = "f16",
    base: str = "nf4",
    model: str | None = None,
    force: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write base + adapter as ``model.gguf``, tokenizer and chat template in it, and a ``Modelfile`` for ollama.

    Args:
        source: A run folder or its adapter folder.
        output: The folder to make; it appears whole or not at all.
        quant: ``f16`` or ``q8_0``: the type of the matrices.
        base: ``nf4`` or ``original``, as for ``merge``.
        model: Where the base is now, if it has moved since the training.
        force: Replace an earlier export.
        device: Where the arithmetic runs; one tensor at a time is there.
        progress: Called with the bytes written and all bytes.

    Raises:
        InputError: No adapter, a family or a tokenizer that is not written here, an output in the way, or weights that
            fp16 cannot hold.
        StorageError: Damaged files, too little disk, or a folder that cannot be written.
    """
    started = time.monotonic()
    if quant not in QUANTS:
        raise InputError(f"--quant {quant!r} is unknown", f"use one of: {', '.join(QUANTS)}")
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError:
        raise InputError("--format gguf needs the gguf package", install_hint("gguf")) from None
    check_target(Path(output), force=force)
    opened = open_adapter(source, model)
    check_original(opened, base)
    family = str(opened.base_files.config.model_type)
    if family not in ARCHITECTURES:
        raise InputError(
            f"{family} models are not written as GGUF here",
            "export --format safetensors, and turn that folder into GGUF with llama.cpp's convert_hf_to_gguf.py",
        )
    writer = GGUFWriter(None, ARCHITECTURES[family])
    add_metadata(writer, opened.base_files.config)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if quant == "f16" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)
    add_tokenizer(writer, opened)
    entries = _entries(opened, quant)
    total = sum(entry.nbytes for entry in entries)
    keep = (*opened.read_from, Path(opened.base_files.source).expanduser())
    with export_folder(Path(output), nbytes=total, force=force, keep=keep) as folder:
        merged = merged_tensors(opened, [entry.spec for entry in entries], base, torch.device(device))
        done = counted(merged, sum(entry.spec.nbytes for entry in entries), progress)
        _write(writer, folder / GGUF_FILE, opened.base_files.config, entries, done)
        write_text(folder / MODELFILE, _modelfile(opened))
        write_card(folder, card_facts(opened, dtype=quant, base=base, form="gguf"))
        files = sorted(path.name for path in folder.iterdir())
    seconds = time.monotonic() - started
    return ExportReport(str(output), "gguf", quant, base, len(entries), total, files, seconds)


def _entries(opened: OpenedAdapter, quant: str) -> list[_Entry]:
    """The tensors, in model order, under llama.cpp's names.

    Raises:
        InputError: A tensor that llama.cpp has no name for.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = opened.base_files.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    entries = []
    for spec in merged_specs(opened.model, torch.float32):
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"llama.cpp has no name for tensor {spec.name!r}", "export --format safetensors")
        matrix = len(spec.shape) > 1
        quantised = matrix and quant == "q8_0" and spec.shape[-1] % _BLOCK == 0
        dtype = torch.float16 if matrix and not quantised else torch.float32
        entries.append(_Entry(name, TensorSpec(spec.name, dtype, spec.shape), quantised))
    return entries


def _write(
    writer: GGUFWriter, path: Path, config: Any, entries: list[_Entry], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for entry in entries:
        kind = GGMLQuantizationType.Q8_0 if entry.quantised else None
        dtype = np.dtype(np.float16 if entry.spec.dtype == torch.float16 else np.float32)
        writer.add_tensor_info(entry.name, entry.spec.shape, dtype, entry.nbytes, raw_dtype=kind)
    partial = path.with_name(path.name + ".partial")
    try:
        with storage_errors(path):
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            data = _as_stored(entry, tensor.cpu(), config)
            del tensor
            with storage_errors(path):
                writer.write_tensor_data(data)
            del data
        with storage_errors(path):
            _to_disk(writer)
            os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _to_disk(writer: GGUFWriter) -> None:
    for file in writer.fout or ():
        file.flush()
        os.fsync(file.fileno())


def _as_stored(entry: _Entry, tensor: Tensor, config: Any) -> Any:
    """The tensor as llama.cpp wants it, a numpy array of the entry's type."""
    if ARCHITECTURES[config.model_type] == "llama" and (".attn_q." in entry.name or ".attn_k." in entry.name):
        heads = config.num_attention_heads if ".attn_q." in entry.name else config.num_key_value_heads
        tensor = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2)
        tensor = tensor.reshape(entry.spec.shape)
    if config.model_type.startswith("gemma") and entry.name.endswith("norm.weight"):
        tensor = tensor + 1
    array = tensor.contiguous().numpy()
    if not entry.quantised:
        return array
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(array, GGMLQuantizationType.Q8_0)


def _modelfile(opened: OpenedAdapter) -> str:
    """What ``ollama create -f Modelfile`` reads; it takes the chat template from the file itself where it knows it."""
    stops = [f'PARAMETER stop "{text}"' for text in end_texts(opened) if '"' not in text]
    return "\n".join([f"FROM ./{GGUF_FILE}", *stops, ""])
