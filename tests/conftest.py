"""What the tests share: no network, few threads, tiny models of every supported family, and one small real model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# Several test processes share a few cores; oversubscription costs more than parallel kernels of this size win.
torch.set_num_threads(max(1, min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))))

TINY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
TINY_VOCABULARY = 512

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "the film was good and the story was good too, positive",
    "the film was bad and the acting was worse, negative",
    "review sentiment question answer user assistant system instruction input output prompt completion",
    "a quick brown fox jumps over the lazy dog while seven wizards mix potions in the garden",
    "what is the capital of france? the capital of france is paris. what is two plus two? four",
    "training a small model on a small card with a low-rank part and a sparse part of the weights",
)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard() -> None:
    """A shell starts background jobs with SIGINT ignored; the tests of signals need the usual handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a ChatML template; bos, eos and pad are three tokens.

    It has some 460 tokens: the tiny models pad their vocabulary to 512, as real ones do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=_CHATML,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``tiny_model_dir("llama")``: a folder with a random two-layer bf16 checkpoint and its tokenizer.

    The folder is made once a session and shared: copy it before you change it.
    """
    made: dict[str, Path] = {}

    def folder_of(family: str = "llama") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            save_tiny_model(family, folder, tiny_tokenizer)
            made[family] = folder
        return made[family]

    return folder_of


def save_tiny_model(family: str, folder: Path, tokenizer: Any, *, shard_size: str = "50GB", **changes: Any) -> None:
    """Write a random checkpoint: 2 layers, hidden 64, intermediate 192, 4 heads over 2 kv heads, vocabulary 512.

    Args:
        family: A transformers ``model_type``, one of :data:`TINY_FAMILIES`.
        folder: Where the checkpoint goes.
        tokenizer: Saved beside it; its special tokens go into the config.
        shard_size: Largest safetensors file, to get a sharded checkpoint.
        changes: Config values that differ from the ones above.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,  # bitsandbytes' CPU decode, an oracle here, is wrong for some K % 64 != 0
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": TINY_VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.08,  # at the usual 0.02 so small a model predicts next to nothing
        "dtype": "bfloat16",
    }
    if family.startswith("gemma"):
        settings |= {"query_pre_attn_scalar": 16, "sliding_window": 128}
    config = AutoConfig.for_model(family, **(settings | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def tiny_rows(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_rows()``: the path of a new .jsonl file of 16 prompt/completion rows that a model can learn.

    ``tiny_rows(rows=[...], count=16, name="rows.jsonl")`` writes other rows, more of them, or another file name.
    """

    def write(rows: Sequence[dict[str, Any]] | None = None, *, count: int = 16, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = rows if rows is not None else [_review_row(index) for index in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def _review_row(index: int) -> dict[str, str]:
    good = index % 2 == 0
    word = ("good", "better", "lovely")[index % 3] if good else ("bad", "worse", "lazy")[index % 3]
    return {
        "prompt": f"Review {index}: the film was {word}\nSentiment:",
        "completion": " positive" if good else " negative",
    }


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as bf16 safetensors (fetched and prepared once, then cached)."""
    from bench.assets import smollm2 as prepared

    return prepared()
