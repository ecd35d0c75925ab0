"""Loading a base: an empty model, filled tensor by tensor, each linear layer quantised as it comes.

At no time does a 16-bit copy of the model stand beside the 4-bit one: the peak is the 4-bit model and one 16-bit
matrix. All parameters are frozen; adapters are added afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears, replace_module, target_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.base.base_files import BaseFiles, SafetensorsBase, first_line
from qrosa.base.open import open_base
from qrosa.base.saving import SavesAdapter
from qrosa.errors import InputError, StorageError
from qrosa.ops.few_rows_head import OutputHead
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
Place = Callable[[str, NF4Weight], NF4Weight]


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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base in 4 bits.

    Args:
        source: A folder, a ``.gguf`` file, a hub id, or an opened checkpoint.
        device: Where the model goes.
        dtype: Dtype of what is not quantised (embeddings, norms, head) and of the computation.
        progress: Called with (tensors done, tensors in all).
        place: Takes (module path, packed weight on ``device``) and says where the weight is kept, for a streamed base.

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
    _fill(model, base_files, torch.device(device), dtype, progress, place)
    info = BaseInfo(base_files.source, base_files.kind, base_files.fingerprint(), count_parameters(model))
    model.qrosa_base = info  # type: ignore[assignment]
    model.save_pretrained = SavesAdapter(model, None)  # type: ignore[assignment]
    generation = base_files.generation_config()
    if generation:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(generation)
    return model.eval(), tokenizer


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with meta parameters and meta ``QRosaLinear`` layers; its (computed) buffers are real.

    Raises:
        InputError: The architecture is not a causal language model, or has no suitable linear layers.
    """
    model = meta_model(config, dtype)
    for path, linear in target_linears(model).items():
        weight = NF4Weight.meta((linear.out_features, linear.in_features), dtype)
        replace_module(model, path, QRosaLinear(weight, linear.bias))
    _turn_head(model)
    model.tie_weights()  # making parameters meta one by one has untied them
    model.requires_grad_(False)
    return model


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers builds it, with meta parameters and real (computed) buffers.

    Raises:
        InputError: The architecture is not a causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # an unsupported config surfaces as ValueError, KeyError or AttributeError
        raise InputError(
            f"{getattr(config, 'model_type', 'this')} cannot be built as a causal LM: {first_line(error)}",
            "use a decoder-only model such as Llama, Mistral, Qwen, Gemma or Phi-3",
        ) from None
    return model


def _turn_head(model: PreTrainedModel) -> None:
    """Put a head that is quick for few rows in the place of a plain one."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        path = next(path for path, module in model.named_modules() if module is head)
        replace_module(model, path, OutputHead.of(head))


def quantize_weight(base_files: BaseFiles, path: str, device: torch.device | str = "cpu") -> NF4Weight:
    """The 4-bit weight of the module at ``path``: read as stored, or quantised from the original.

    Loading, repair and export all come here, so they agree on the base to the bit.
    """
    if isinstance(base_files, SafetensorsBase) and base_files.is_nf4(path):
        weight = base_files.read_nf4(path).to(device)
        weight.dtype = torch.bfloat16
        return weight
    name = f"{path}.weight"
    base_files.require(name)
    dense = base_files.read(name)
    if dense.ndim != 2 or not dense.is_floating_point():
        raise InputError(
            f"tensor {name!r} of {base_files.source} is {dense.dtype} {tuple(dense.shape)}, no floating-point matrix",
            "use a bf16, fp16 or fp32 checkpoint, or one quantised to NF4 by bitsandbytes",
        )
    return NF4Weight.quantize(dense.to(device), torch.bfloat16)


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
) -> None:
    layers = quantized_linears(model)
    dense = [name for name, _ in model.named_parameters()]  # a tied head is listed once, as the embedding
    shared_code: Tensor | None = None
    for done, path in enumerate(layers):
        layer = layers[path]
        weight = quantize_weight(base_files, path, device)
        _check_shape(base_files, f"{path}.weight", weight.shape, layer.weight.shape)
        if weight.absmax_code is not None:
            # The 8-bit map is the same 1 KiB table for every layer: keep one.
            same = shared_code is not None and torch.equal(shared_code, weight.absmax_code)
            shared_code = shared_code if same else weight.absmax_code
            weight.absmax_code = shared_code
        layer.weight = place(path, weight) if place else weight
        layer.device = device
        if progress:
            progress(done + 1, len(layers) + len(dense))
    parameters = dict(model.named_parameters())
    for done, name in enumerate(dense):
        set_parameter(model, name, read_dense(base_files, name, parameters[name]).to(device, dtype))
        if progress:
            progress(len(layers) + done + 1, len(layers) + len(dense))
    model.tie_weights()
    move_buffers(model, device)


def read_dense(base_files: BaseFiles, name: str, parameter: Tensor) -> Tensor:
    """A floating-point tensor of the base, checked to have the shape of the parameter that it is for.

    Raises:
        InputError: It is not there, or is quantised.
        StorageError: It has another shape.
    """
    base_files.require(name)
    tensor = base_files.read(name)
    _check_shape(base_files, name, tuple(tensor.shape), tuple(parameter.shape))
    if not tensor.is_floating_point():
        raise InputError(
            f"tensor {name!r} of {base_files.source} is {tensor.dtype}, not floating point", "use a 16-bit checkpoint"
        )
    return tensor


def _check_shape(base_files: BaseFiles, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise StorageError(
            f"tensor {name!r} of {base_files.source} has shape {tuple(found)}, its config asks for {tuple(expected)}",
            "the weights and config.json are of different models; download them again",
        )


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
