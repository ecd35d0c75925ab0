"""Checkpoints of real shapes with random weights, already in 4 bits, so that 70B parameters are 36 GB on a disk.

The format is bitsandbytes' (what ``save_pretrained`` writes of a model that was loaded in 4 bits). Neither memory nor
speed depends on the values: codes and absmax repeat one random stretch, and everything else is small and near zero.

    python bench/random_checkpoint.py llama-3.1-8b /tmp/llama-3.1-8b
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file

SHARD_BYTES = 4 * 10**9
_BLOCK, _NESTED_BLOCK = 64, 256
_STRETCH = 1 << 20
_GQA = {"model_type": "llama", "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _GQA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "mistral-nemo-12b": _GQA
    | {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 131072,
        "sliding_window": None,
    },
    "qwen2.5-32b": _GQA
    | {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "llama-3.1-70b": _GQA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
"""What the published config.json of each model says of its shape."""


def write_checkpoint(folder: Path, shape: Mapping[str, Any]) -> Path:
    """Write a 4-bit checkpoint of this shape; a folder that has one already is left as it is.

    Args:
        folder: Where to.
        shape: Values of config.json, ``model_type`` among them.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    count = 0
    for tensors in _tensors(shape):
        if shard and sum(t.nbytes for t in (*shard.values(), *tensors.values())) > SHARD_BYTES:
            count = _write(folder, shard, count, weight_map)
        shard |= tensors
    _write(folder, shard, count, weight_map)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    document = {**shape, "torch_dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n")
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer that loads; no text goes through it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def _write(folder: Path, shard: dict[str, torch.Tensor], count: int, weight_map: dict[str, str]) -> int:
    name = f"model-{count + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, name)
    shard.clear()
    return count + 1


def _tensors(shape: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the checkpoint, those of one weight at a time, in the model's order."""
    from transformers import AutoConfig

    from qrosa.adapters.linear import QRosaLinear
    from qrosa.base.build import empty_model

    settings = dict(shape)
    model = empty_model(AutoConfig.for_model(settings.pop("model_type"), **settings))
    generator = torch.Generator().manual_seed(0)
    stretch = torch.randint(0, 256, (_STRETCH,), dtype=torch.uint8, generator=generator)
    normal = torch.randn(_STRETCH, generator=generator).mul_(1e-3).bfloat16()
    for path, module in model.named_modules():
        if isinstance(module, QRosaLinear):
            yield packed(f"{path}.weight", module.out_features, module.in_features, stretch)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                yield {f"{path}.{name}": torch.full(parameter.shape, 1.0 if name == "weight" else 1e-3).bfloat16()}
            else:  # rows that differ: of a head whose rows are all alike, the gradients cancel
                yield {f"{path}.{name}": _repeated(normal, parameter.numel()).view(parameter.shape)}


def packed(name: str, rows: int, columns: int, stretch: torch.Tensor) -> dict[str, torch.Tensor]:
    """One NF4 weight with a nested absmax, as bitsandbytes stores it.

    Args:
        name: Of the weight, as ``model.layers.0.mlp.up_proj.weight``.
        rows: Output features.
        columns: Input features.
        stretch: Random bytes that codes and absmax repeat.
    """
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    size = rows * columns
    blocks = -(-size // _BLOCK)
    nested = QuantState(
        absmax=torch.full((-(-blocks // _NESTED_BLOCK),), 0.01),
        blocksize=_NESTED_BLOCK,
        code=create_dynamic_map(),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=_repeated(stretch, blocks),
        shape=torch.Size((rows, columns)),
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(0.05),
        state2=nested,
    )
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: _repeated(stretch, -(-size // 2)).view(-1, 1), **parts}


def _repeated(stretch: torch.Tensor, size: int) -> torch.Tensor:
    return stretch.repeat(-(-size // stretch.numel()))[:size].clone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    write_checkpoint(chosen.folder, SHAPES[chosen.model])
