"""Model shapes: equal to the models that transformers builds, and to the published sizes of real models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.real_models import MODELS, write_config
from qrosa.base.families import FAMILIES as TABLE
from qrosa.base.model_config import model_config
from qrosa.base.shape import from_config
from qrosa.base.shape_source import read_shape
from qrosa.errors import InputError, QrosaError, StorageError

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    ("mistral", {"num_key_value_heads": 2, "head_dim": 24}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 24}),
    ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 24}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
    ("phi", {}),
    ("smollm3", {"num_key_value_heads": 2, "pad_token_id": 0}),
]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_family_is_the_model_that_transformers_builds(family: str, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    from qrosa.adapters.inject import target_linears

    config = AutoConfig.for_model(family, **(SMALL | changes))
    shape = from_config("test", config.to_dict())
    model = meta_model(config)
    expected = [(path, m.out_features, m.in_features) for path, m in target_linears(model).items()]
    assert [(x.path, x.out_features, x.in_features) for x in shape.linears] == expected
    assert shape.base_parameters == sum(p.numel() for p in model.parameters())
    weights = {f"{path}.weight" for path, _, _ in expected}
    assert shape.unquantised == {n: p.numel() for n, p in model.named_parameters() if n not in weights}


@pytest.mark.parametrize("family", TABLE)
def test_defaults_that_a_config_leaves_out_are_transformers_own(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    for key, value in TABLE[family].defaults.items():
        assert getattr(config, key) == value, key
    assert from_config("test", {"model_type": family}).dims.kv_heads == config.num_key_value_heads


@pytest.mark.parametrize(("name", "billions"), [(name, model.billions) for name, model in MODELS.items()])
def test_real_models_have_their_published_size(tmp_path: Path, name: str, billions: float) -> None:
    shape = read_shape(str(write_config(tmp_path, name)))
    assert shape.read_from == "config" and shape.dims.known
    assert round(shape.base_parameters / 1e9, 2 if billions < 10 else 1) == billions


def test_a_multimodal_config_is_read_for_its_text_model() -> None:
    inner = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    shape = from_config("test", {"model_type": "gemma3", "text_config": inner, "vision_config": {}})
    assert round(shape.base_parameters / 1e9, 2) == 3.88
    assert model_config({"model_type": "gemma3", "text_config": {}}, "test").family == "gemma3_text"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_headers_say_the_same_as_the_config(tiny_model_dir: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(family)
    from_headers = read_shape(str(folder))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    from_json = read_shape(str(tmp_path))
    assert (from_headers.read_from, from_json.read_from) == ("headers", "config")
    assert from_headers.linears == from_json.linears
    assert from_headers.unquantised == from_json.unquantised
    assert from_headers.stored_bytes == 2


def test_a_folder_with_config_and_index_only(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "Llama-3.1-8B")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00004.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_shape(str(folder)).read_from == "config"


def test_an_nf4_checkpoint(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qrosa.quant.nf4 import NF4Weight

    folder = tiny_model_dir("llama")
    plain = read_shape(str(folder))
    tensors = load_file(folder / "model.safetensors")
    for linear in plain.linears:
        name = f"{linear.path}.weight"
        packed, state = NF4Weight.quantize(tensors[name]).to_bnb()
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(tmp_path))
    assert shape.kind == "nf4" and shape.nested
    assert shape.linears == plain.linears and shape.base_parameters == plain.base_parameters


def write_gguf(path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen2")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    shapes = {"token_embd": (128, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    shapes |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}
    shapes |= {"blk.0.ffn_down": (64, 96)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    for name, width in (("q", 64), ("k", 32), ("v", 32)):
        writer.add_tensor(f"blk.0.attn_{name}.bias", np.zeros(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    shape = read_shape(str(tmp_path / "tiny.gguf"))
    config = SMALL | {"model_type": "qwen2", "num_hidden_layers": 1, "num_key_value_heads": 2}
    same = from_config("test", config | {"tie_word_embeddings": True})
    assert shape.kind == "gguf" and shape.stored_bytes == 4 and shape.dims.tied
    assert {x.path: x for x in shape.linears} == {x.path: x for x in same.linears}
    assert shape.base_parameters == same.base_parameters


BAD: list[tuple[dict[str, str], str, str]] = [
    ({}, "no config.json", "folder"),
    ({"config.json": "{"}, "not valid JSON", "again"),
    ({"config.json": "[]"}, "JSON object", "again"),
    ({"config.json": '{"model_type": "bert"}'}, "is an encoder", "decoder"),
    ({"config.json": '{"model_type": "llama", "hidden_size": -1}'}, "hidden_size", "above zero"),
    ({"config.json": '{"model_type": "llama", "vocab_size": "many"}'}, "vocab_size", "above zero"),
    ({"config.json": '{"model_type": "llama", "num_local_experts": 8}'}, "mixture of experts", "dense"),
    ({"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'}, "gptq", "16-bit"),
    ({"config.json": '{"model_type": "llama"}', "model.safetensors": "rubbish"}, "safetensors", "again"),
    ({"config.json": '{"model_type": "llama"}', "model.safetensors.index.json": "{}"}, "weight map", "again"),
]


@pytest.mark.parametrize(("files", "says", "hint"), BAD, ids=[says for _, says, _ in BAD])
def test_bad_folders(tmp_path: Path, files: dict[str, str], says: str, hint: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(QrosaError, match=says) as caught:
        read_shape(str(tmp_path))
    assert hint in caught.value.hint


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/model", "", "someone/not-cached-here", "a b/c", "x.gguf"])
def test_models_that_do_not_exist(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read_shape(source)
    assert caught.value.hint


def test_a_damaged_gguf_file_and_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises((StorageError, InputError)):
        read_shape(str(tmp_path / "bad.gguf"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="neither"):
        read_shape(str(tmp_path / "notes.txt"))


def test_sizes_add_up() -> None:
    shape = from_config("test", {"model_type": "llama"} | SMALL)
    assert shape.base_parameters == math.fsum([*(x.size for x in shape.linears), *shape.unquantised.values()])
