"""Adapter files: written whole or not at all, and hostile ones refused before their data is touched."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from qrosa.errors import InputError, QrosaError, StorageError
from qrosa.files import read_safetensors_header
from qrosa.sparse import store

TENSORS = {
    "layer.low_rank_A": torch.randn(2, 6).bfloat16(),
    "layer.sparse_col": torch.tensor([1, 2], dtype=torch.uint16),
}
CONFIG = {"base": {}, "adapter": {}, "modules": {"layer": {"rank": 2, "nnz": 2, "alpha": 4.0, "shape": [4, 6]}}}


def test_round_trip(tmp_path: Path) -> None:
    store.write_adapter(tmp_path / "a", TENSORS, CONFIG)
    tensors, config = store.read_adapter(tmp_path / "a")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert config["format"] == "qrosa-adapter"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "adapter_config.json"]


def test_header_agrees_with_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    store.write_tensors(path, TENSORS)
    header, offset = read_safetensors_header(path)
    with safe_open(path, "pt") as file:
        assert set(header) == set(file.keys())
        for name, (_, shape, _) in header.items():
            assert list(shape) == file.get_slice(name).get_shape()
    begin, end = header["layer.low_rank_A"][2]
    raw = path.read_bytes()[offset + begin : offset + end]
    assert raw == TENSORS["layer.low_rank_A"].view(torch.uint8).numpy().tobytes()


def _file(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "shorter than its length field": b"\x01\x02",
    "huge header": _file({"a": _entry()}, length=2**62),
    "header longer than the file": _file({"a": _entry()}, length=10_000),
    "not json": _file(b"{nonsense"),
    "not utf-8": _file(b"\xff\xfe\xfd"),
    "a list": _file([1, 2]),
    "deeply nested": _file(b"[" * 100_000),
    "entry is no object": _file({"a": 3}),
    "unknown dtype": _file({"a": _entry(dtype="PICKLE")}),
    "negative shape": _file({"a": _entry(shape=(-2,))}),
    "float shape": _file({"a": _entry(shape=(2.0,))}),
    "boolean offset": _file({"a": _entry(offsets=(False, 8))}),
    "shape and bytes disagree": _file({"a": _entry(shape=(3,))}),
    "offsets past the end": _file({"a": _entry(shape=(4,), offsets=(0, 16))}),
    "truncated data": _file({"a": _entry()}, data=b"\0" * 4),
    "trailing data": _file({"a": _entry()}, data=b"\0" * 12),
    "overlapping tensors": _file({"a": _entry(), "b": _entry()}),
    "a gap": _file({"a": _entry(offsets=(8, 16))}, data=b"\0" * 16),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        store.read_tensors(path)
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("nonsense", StorageError),
        ("[]", StorageError),
        ('{"format": "lora"}', InputError),
        ('{"format": "qrosa-adapter", "version": 99}', InputError),
        ('{"format": "qrosa-adapter", "version": 1}', InputError),
        ('{"format": "qrosa-adapter", "version": 2, "base": 3}', StorageError),
    ],
)
def test_unsuitable_configs_are_refused(tmp_path: Path, config: str, error: type[QrosaError]) -> None:
    (tmp_path / store.CONFIG_FILE).write_text(config)
    with pytest.raises(error):
        store.read_adapter(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file-not-folder"
    target.write_text("x")
    with pytest.raises(StorageError):
        store.write_adapter(target / "adapter", TENSORS, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["file-not-folder"]


def test_a_missing_adapter_says_where(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no adapter"):
        store.read_adapter(tmp_path)
