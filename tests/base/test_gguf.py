"""``.gguf`` files: whole, in parts, with a part or a tensor missing, with layers that the model does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qrosa.base.open import open_base
from qrosa.base.shape_source import read_shape
from qrosa.errors import QrosaError

Arrays = dict[str, np.ndarray[Any, Any]]
HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 64, 96, 4, 2, 128


def arrays(blocks: int = 2) -> Arrays:
    """The tensors of a random Qwen2 under llama.cpp's names; the head is not tied."""
    random = np.random.default_rng(0)
    key = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for index in range(blocks):
        shapes |= {f"blk.{index}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{index}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "output")}
        shapes |= {f"blk.{index}.attn_{name}": (key, HIDDEN) for name in ("k", "v")}
        shapes |= {f"blk.{index}.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"blk.{index}.ffn_down"] = (HIDDEN, INNER)
    shapes["output"] = (VOCABULARY, HIDDEN)
    made = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for index in range(blocks):
        for name, width in (("q", HIDDEN), ("k", key), ("v", key)):
            made[f"blk.{index}.attn_{name}.bias"] = random.normal(size=width).astype(np.float32)
    return made


def write(path: Path, tensors: Arrays, *, metadata: bool = True, blocks: int = 2) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen2")
    if metadata:
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_block_count(blocks)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_context_length(512)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(VOCABULARY)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_parts(folder: Path, tensors: Arrays, parts: int = 3) -> list[Path]:
    """The metadata in the first part, tensors in all, the head in the last."""
    paths = [folder / f"model-{number + 1:05d}-of-{parts:05d}.gguf" for number in range(parts)]
    items, step = list(tensors.items()), -(-len(tensors) // parts)
    for number, path in enumerate(paths):
        write(path, dict(items[number * step : (number + 1) * step]), metadata=number == 0)
    return paths


@pytest.mark.parametrize("named", [0, 1, 2])
def test_all_parts_of_a_split_file_are_read(named: int, tmp_path: Path) -> None:
    tensors = arrays()
    whole = write(tmp_path / "whole.gguf", tensors)
    part = in_parts(tmp_path, tensors)[named]
    planned, split = read_shape(str(whole)), read_shape(str(part))
    assert split.linears == planned.linears and split.unquantised == planned.unquantised and not split.dims.tied
    one, many = open_base(str(whole)), open_base(str(part))
    assert one.fingerprint() == many.fingerprint() and not many.config.tie_word_embeddings
    assert sorted(one.names()) == sorted(many.names())
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    assert {f"{x.path}.weight" for x in planned.linears} <= set(one.names())


def without_a_part(folder: Path) -> Path:
    paths = in_parts(folder, arrays())
    paths[2].unlink()
    return paths[0]


def without_a_tensor(folder: Path) -> Path:
    return write(folder / "x.gguf", {name: x for name, x in arrays().items() if name != "blk.1.ffn_up.weight"})


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a missing part": (without_a_part, "one of 3 parts, and model-00003-of-00003.gguf"),
    "a missing tensor": (without_a_tensor, r"no tensor 'model.layers.1.mlp.up_proj.weight'"),
    "no such file": (lambda folder: folder / "x.gguf", "does not exist"),
    "damaged": (lambda folder: _damaged(folder / "x.gguf"), "not a sound GGUF file"),
}


def _damaged(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(20))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_plan_and_load_in_the_same_words(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(QrosaError, match=says) as planned:
        read_shape(str(path))
    with pytest.raises(QrosaError) as loaded:
        open_base(str(path))
    assert (planned.value.message, planned.value.hint) == (loaded.value.message, loaded.value.hint)


def test_layers_beyond_the_model_are_left_out_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", arrays(3), blocks=2)
    planned, loaded = read_shape(str(path)), open_base(str(path))
    assert {x.layer for x in planned.linears} == {0, 1}
    assert not any("layers.2." in name for name in loaded.names())
    assert all(any("left out" in note for note in notes) for notes in (planned.notes, loaded.notes))
