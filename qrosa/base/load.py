"""Loading a base: an empty model, filled tensor by tensor, each linear layer quantised as it comes.

At no time does a 16-bit copy of the model stand beside the 4-bit one: the peak is the 4-bit model and one 16-bit
matrix. All parameters are frozen; adapters are added afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.base.base_files import BaseFiles, SafetensorsBase
from qrosa.base.build import empty_model, saved_buffers
from qrosa.base.open import open_base
from qrosa.base.saving import SavesAdapter
from qrosa.errors import StorageError
from qrosa.heap import look
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_READING = 8  # bytes of a value while it is read: in the file's pages, as it is stored, and converted
Progress = Callable[[int, int], None]
Place = Callable[[str, NF4Weight], NF4Weight]
Stored = Callable[[str, NF4Weight], NF4Weight | None]


@dataclass(frozen=True)
class BaseInfo:
    """Where a loaded model's base came from; kept on the model as ``model.qrosa_base``.

    Attributes:
        source: What the user named.
        kind: ``dense``, ``nf4`` or ``gguf``.
        fingerprint: Hex digest of the checkpoint.
        parameters: Number of base parameters, a tied head counted once.
    """

    source: str
    kind: str
    fingerprint: str
    parameters: int


def load_base(
    source: str | BaseFiles,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    place: Place | None = None,
    stored: Stored | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base in 4 bits.

    Args:
        source: A folder, a ``.gguf`` file, a hub id, or an opened checkpoint.
        device: Where the model goes.
        dtype: Dtype of what is not quantised (embeddings, norms, head) and of the computation.
        progress: Called with (tensors done, tensors in all).
        place: Takes (module path, packed weight on ``device``) and says where the weight is kept, for a streamed base.
        stored: Takes (module path, weight on the meta device) and gives the packed weight that an earlier run kept, or
            None: then it is read, quantised and placed.

    Returns:
        A transformers causal language model in eval mode, everything frozen, its decoder's linear layers replaced
        by ``QRosaLinear``, with ``model.qrosa_base``; and the tokenizer.

    Raises:
        InputError: Not a model that can be a base.
        StorageError: Damaged or unreadable files.
    """
    base_files = open_base(source) if isinstance(source, str) else source
    tokenizer = base_files.tokenizer()
    model = empty_model(base_files.config, dtype)
    _fill(model, base_files, torch.device(device), dtype, progress, place, stored)
    info = BaseInfo(base_files.source, base_files.kind, base_files.fingerprint(), count_parameters(model))
    model.qrosa_base = info  # type: ignore[assignment]
    model.save_pretrained = SavesAdapter(model, None)  # type: ignore[assignment]
    generation = base_files.generation_config()
    if generation:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(generation)
    return model.eval(), tokenizer


def quantize_weight(base_files: BaseFiles, path: str, device: torch.device | str = "cpu") -> NF4Weight:
    """The 4-bit weight of the module at ``path``: read as stored, or quantised from the original.

    Loading, repair and export all come here, so they agree on the base to the bit on one kind of device. Between a card
    and the CPU bitsandbytes' mean of a matrix's block maxima differs in its last bit, as sums in another order do, and
    some block scales with it; a mean of our own would be the same everywhere and no longer bitsandbytes' bytes.
    """
    if isinstance(base_files, SafetensorsBase) and base_files.is_nf4(path):
        weight = base_files.read_nf4(path).to(device)
        scales = (weight.absmax, None) if weight.absmax_scale is None else (weight.absmax_scale, weight.absmax_offset)
        _refuse_not_finite(base_files, f"{path}.weight", *scales)
        weight.dtype = torch.bfloat16
        return weight
    name = f"{path}.weight"
    dense = base_files.read(name).to(device)
    _refuse_not_finite(base_files, name, dense)
    return NF4Weight.quantize(dense, torch.bfloat16)


def _refuse_not_finite(base_files: BaseFiles, name: str, *values: Tensor | None) -> None:
    """Refuse weights that are no numbers: training on them fails later, and far from the cause.

    Raises:
        StorageError: One is.
    """
    for tensor in values:
        if tensor is None or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            continue
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        value = float(tensor[tuple(place)])
        raise StorageError(
            f"tensor {name!r} of {base_files.source} holds {value} at {place}: its weights are damaged",
            "download the checkpoint again, or use one that is sound",
        )


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base: dense ones once each, N * K for a quantised matrix; adapters do not count."""
    layers = quantized_linears(model)
    adapters = {id(parameter) for layer in layers.values() for parameter in layer.adapter_parameters().values()}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in adapters)
    return dense + sum(layer.out_features * layer.in_features for layer in layers.values())


def _fill(
    model: PreTrainedModel,
    base_files: BaseFiles,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
    place: Place | None,
    stored: Stored | None,
) -> None:
    layers = quantized_linears(model)
    dense = [name for name, _ in model.named_parameters()]  # a tied head is listed once, as the embedding
    shared_code: Tensor | None = None
    for done, path in enumerate(layers):
        layer = layers[path]
        layer.device = device
        kept = stored(path, layer.weight) if stored else None
        if progress:
            progress(done + 1, len(layers) + len(dense))
        if kept is not None:
            layer.weight = kept
            continue
        weight = quantize_weight(base_files, path, device)
        if weight.absmax_code is not None:
            # The 8-bit map is the same 1 KiB table for every layer: keep one.
            same = shared_code is not None and torch.equal(shared_code, weight.absmax_code)
            shared_code = shared_code if same else weight.absmax_code
            weight.absmax_code = shared_code
        layer.weight = place(path, weight) if place else weight
    for done, name in enumerate(dense):
        look(_READING * math.prod(base_files.shape(name)))
        set_parameter(model, name, read_dense(base_files, name).to(device, dtype))
        if progress:
            progress(len(layers) + done + 1, len(layers) + len(dense))
    fill_buffers(model, base_files)
    model.tie_weights()
    move_buffers(model, device)


def read_dense(base_files: BaseFiles, name: str) -> Tensor:
    """A floating-point tensor of the base.

    Raises:
        StorageError: It holds values that are no numbers.
    """
    tensor = base_files.read(name)
    _refuse_not_finite(base_files, name, tensor)
    return tensor


def fill_buffers(model: PreTrainedModel, base_files: BaseFiles) -> None:
    """Tensors that are saved and are no parameters; one that a checkpoint leaves out keeps its computed value."""
    stored = set(base_files.names())
    for name, buffer in saved_buffers(model).items():
        if name in stored:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = base_files.read(name).to(buffer.dtype)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a frozen parameter in the place of the one at ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers on the device, in their own dtypes."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def base_info(model: nn.Module) -> BaseInfo:
    """Where a loaded model's base came from."""
    return cast(BaseInfo, model.qrosa_base)
