"""config.json values of real models, for tests that plan them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RealModel:
    """A config.json and the published number of parameters, in billions."""

    billions: float
    config: dict[str, Any]


def _sizes(
    family: str, vocab: int, d: int, f: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "torch_dtype": "bfloat16",
        **more,
    }


MODELS: dict[str, RealModel] = {
    "Llama-3.1-8B": RealModel(8.03, _sizes("llama", 128256, 4096, 14336, 32, 32, 8, max_position_embeddings=131072)),
    "Mistral-7B": RealModel(
        7.25, _sizes("mistral", 32768, 4096, 14336, 32, 32, 8, max_position_embeddings=32768, sliding_window=None)
    ),
    "Mistral-Nemo-12B": RealModel(
        12.2,
        _sizes(
            "mistral", 131072, 5120, 14336, 40, 32, 8, head_dim=128, max_position_embeddings=131072, sliding_window=None
        ),
    ),
    "Qwen2.5-7B": RealModel(7.62, _sizes("qwen2", 152064, 3584, 18944, 28, 28, 4, max_position_embeddings=32768)),
    "Qwen2.5-14B": RealModel(14.8, _sizes("qwen2", 152064, 5120, 13824, 48, 40, 8, max_position_embeddings=32768)),
    "Qwen3-8B": RealModel(
        8.19, _sizes("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128, max_position_embeddings=40960)
    ),
    "Gemma-2-9B": RealModel(
        9.24, _sizes("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256, max_position_embeddings=8192)
    ),
    "Phi-3-medium": RealModel(
        14.0, _sizes("phi3", 32064, 5120, 17920, 40, 40, 10, max_position_embeddings=4096, sliding_window=2047)
    ),
}

LARGE: dict[str, RealModel] = {
    "Qwen2.5-32B": RealModel(32.8, _sizes("qwen2", 152064, 5120, 27648, 64, 40, 8, max_position_embeddings=32768)),
    "Llama-3.1-70B": RealModel(70.6, _sizes("llama", 128256, 8192, 28672, 80, 64, 8, max_position_embeddings=131072)),
}


def write_config(folder: Path, name: str) -> Path:
    """A model folder that holds nothing but the config.json of ``name``."""
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "config.json").write_text(json.dumps((MODELS | LARGE)[name].config))
    return made


SMOLLM2 = _sizes("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, max_position_embeddings=8192)

# What the hub's config.json of each recipe's model says, by the name that the recipe gives.
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "meta-llama/Llama-3.1-8B-Instruct": MODELS["Llama-3.1-8B"].config,
    "meta-llama/Llama-3.1-70B-Instruct": LARGE["Llama-3.1-70B"].config,
    "mistralai/Mistral-Nemo-Instruct-2407": MODELS["Mistral-Nemo-12B"].config,
    "Qwen/Qwen2.5-14B-Instruct": MODELS["Qwen2.5-14B"].config,
    "Qwen/Qwen2.5-32B-Instruct": LARGE["Qwen2.5-32B"].config,
}
