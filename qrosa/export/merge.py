"""Merge an adapter into its base: a folder of 16-bit safetensors that loads in plain transformers.

What was trained is what is exported. Training saw ``deq(NF4(W))``, never W, and the adapter has learnt to correct
*that* base; merged into the original weight instead, it corrects errors that are no longer there (users of other
tools measured several points of accuracy lost). So each matrix goes through the same NF4 round trip as when it was
loaded, by the same function, is composed in fp32 and rounded once::

    W_out = cast(deq(NF4(W)) + S + (alpha / r) * B @ A)

``base="original"`` puts W in place of the round trip, for whoever knows that they want it; `qrosa.export.verify`
measures the drift of either. Tensors that are not quantised pass through bf16, the dtype in which training held them.

Everything is streamed from the checkpoint's files, one tensor at a time; see `qrosa.export.shards`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrosa.adapters.compose import compose
from qrosa.adapters.linear import QRosaLinear
from qrosa.adapters.low_rank import LowRank
from qrosa.base.base_files import read_original_weight
from qrosa.base.build import saved_buffers
from qrosa.base.load import quantize_weight
from qrosa.base.speech import with_ends
from qrosa.errors import InputError
from qrosa.export.card import write_card
from qrosa.export.folder import check_target, export_folder
from qrosa.export.shards import MAX_SHARD_BYTES, TensorSpec, plan_shards, storage_errors, write_shards
from qrosa.export.source import OpenedAdapter, card_facts, open_adapter, open_bare, write_tokenizer
from qrosa.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BASES = ("nf4", "original")
_TRAINED_DTYPE = torch.bfloat16
_FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        output: The folder.
        format: ``safetensors`` or ``peft``.
        dtype: ``fp16`` or ``bf16``; for ``peft`` that of the adapter, which may be ``fp32``.
        base: ``nf4`` or ``original``; empty for ``peft``.
        tensors: Number of tensors.
        bytes: Bytes of all tensors.
        files: The files in the folder.
        seconds: Time taken.
    """

    output: str
    format: str
    dtype: str
    base: str
    tensors: int
    bytes: int
    files: list[str]
    seconds: float


def merge(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp16",
    base: str = "nf4",
    base_only: bool = False,
    model: str | None = None,
    force: bool = False,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write base + adapter as one 16-bit model that needs neither qrosa nor the base.

    Args:
        source: A run folder or its adapter folder; for ``base_only`` also a model.
        output: The folder to make; it appears whole or not at all.
        dtype: ``fp16`` or ``bf16``.
        base: ``nf4``, the base as it was trained on, or ``original``, the checkpoint's own weights.
        base_only: Leave the adapter out: the base that many adapters go on, in PEFT's format.
        model: Where the base is now, if it has moved since the training.
        force: Replace an earlier export.
        device: Where the arithmetic runs; one tensor at a time is there.
        max_shard_bytes: Largest file.
        progress: Called with the bytes written and all bytes.

    Returns:
        What was written.

    Raises:
        InputError: No adapter, another base, an output in the way, or weights that do not fit fp16.
        StorageError: Damaged files, too little disk, or a folder that cannot be written.
    """
    started = time.monotonic()
    _check_choices(dtype, base)
    check_target(Path(output), force=force)
    opened = open_bare(source, model) if base_only else open_adapter(source, model)
    check_original(opened, base)
    specs = merged_specs(opened.model, DTYPES[dtype])
    shards = plan_shards(specs, max_shard_bytes)
    total = sum(spec.nbytes for spec in specs)
    keep = (*opened.read_from, Path(opened.base_files.source).expanduser())
    with export_folder(Path(output), nbytes=total, force=force, keep=keep) as folder:
        tensors = merged_tensors(opened, specs, base, torch.device(device))
        write_shards(folder, shards, counted(tensors, total, progress))
        _write_model_files(opened, folder, DTYPES[dtype])
        write_card(folder, card_facts(opened, dtype=dtype, base=base))
        files = sorted(path.name for path in folder.iterdir())
    seconds = time.monotonic() - started
    return ExportReport(str(output), "safetensors", dtype, base, len(specs), total, files, seconds)


def _check_choices(dtype: str, base: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is unknown", f"use one of: {', '.join(DTYPES)}")
    if base not in BASES:
        raise InputError(f"--base {base!r} is unknown", f"use one of: {', '.join(BASES)}")


def check_original(opened: OpenedAdapter, base: str) -> None:
    """Refuse original weights of a base that is already quantised.

    Raises:
        InputError: They are asked for and not known.
    """
    if base == "original" and opened.base_files.kind == "nf4":
        raise InputError(
            f"{opened.base_files.source} is already quantised: its original weights are not known", "use --base nf4"
        )


def merged_weight(opened: OpenedAdapter, path: str, base: str, device: torch.device) -> Tensor:
    """W_eff of one layer, composed in fp32 [N, K].

    Args:
        opened: The adapter and its base.
        path: The layer's path in the model.
        base: ``nf4`` or ``original``.
        device: Where to compute.
    """
    if base == "original":
        weight = read_original_weight(opened.base_files, path).to(device, torch.float32, copy=True)
    else:
        weight = quantize_weight(opened.base_files, path, device).dequantize(torch.float32)
    return compose(weight, *opened.parts(path))


def merged_specs(model: PreTrainedModel, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the merged model, in model order; a tied head is the embedding and is not written twice."""
    specs, seen = [], set()
    for path, module in model.named_modules():
        if isinstance(module, LowRank):
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, QRosaLinear):
            specs.append(TensorSpec(f"{prefix}weight", dtype, module.weight.shape))
        for name, parameter in module.named_parameters(recurse=False):
            adapter = isinstance(module, QRosaLinear) and name in module.adapter_parameters()
            if not adapter and id(parameter) not in seen:
                seen.add(id(parameter))
                specs.append(TensorSpec(f"{prefix}{name}", dtype, tuple(parameter.shape)))
    for name, buffer in saved_buffers(model).items():
        specs.append(TensorSpec(name, dtype if buffer.is_floating_point() else buffer.dtype, tuple(buffer.shape)))
    return specs


def merged_tensors(
    opened: OpenedAdapter, specs: list[TensorSpec], base: str, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the merged model, one at a time, in the order and the dtypes of `specs`.

    Raises:
        InputError: Values that are not finite, or that fp16 cannot hold.
        StorageError: A damaged file of the base.
    """
    buffers, stored = saved_buffers(opened.model), set(opened.base_files.names())
    for spec in specs:
        path, _, leaf = spec.name.rpartition(".")
        if spec.name in buffers:
            value = opened.base_files.read(spec.name) if spec.name in stored else buffers[spec.name]
        elif leaf == "weight" and isinstance(opened.model.get_submodule(path), QRosaLinear):
            value = merged_weight(opened, path, base, device)
        else:
            value = opened.base_files.read(spec.name)
            value = value if base == "original" else value.to(_TRAINED_DTYPE)
        if spec.dtype.is_floating_point:
            _check_range(spec.name, value, spec.dtype)
        yield spec.name, value.to(spec.dtype)
        del value


def _check_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Refuse values that the dtype cannot hold.

    Raises:
        InputError: A value that is not finite, or beyond 65504 for fp16.
    """
    low, high = (float(bound) for bound in torch.aminmax(value))
    largest = max(-low, high)
    if not largest <= torch.finfo(torch.float32).max:  # NaN compares false
        raise InputError(f"tensor {name!r} holds values that are not finite", "the run diverged: export an earlier one")
    if dtype == torch.float16 and largest > _FP16_MAX:
        raise InputError(f"tensor {name!r} reaches {largest:.4g}, beyond fp16's 65504", "export with --dtype bf16")


def counted(
    tensors: Iterator[tuple[str, Tensor]], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with their bytes told to ``progress`` once each is done with."""
    done = 0
    for name, tensor in tensors:
        nbytes = tensor.nbytes
        yield name, tensor
        del tensor
        done += nbytes
        if progress is not None:
            progress(done, total)


def _write_model_files(opened: OpenedAdapter, folder: Path, dtype: torch.dtype) -> None:
    """config.json without a trace of quantisation, generation_config.json and the tokenizer."""
    from transformers import GenerationConfig

    config = copy.deepcopy(opened.base_files.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(opened.model).__name__]
    generation = opened.base_files.generation_config()
    if generation is None:
        generation = GenerationConfig.from_model_config(config).to_diff_dict()
    known = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    ends = with_ends(known, opened.speech.end_tokens)
    if ends is not None:
        generation = {**generation, "eos_token_id": ends}
    with storage_errors(folder):
        config.save_pretrained(folder)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(opened, folder)
