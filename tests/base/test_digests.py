"""A base is known by all of its bytes, which are read once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qrosa.base.digests import tensor_digests
from qrosa.base.open import open_base
from qrosa.base.weight_files import StoredTensor
from qrosa.files import cache_folder


@pytest.fixture
def base(tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QROSA_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model_dir(), tmp_path / "base"))


def fingerprint(folder: Path) -> str:
    return open_base(str(folder)).fingerprint()


def change(folder: Path, tensor: str) -> None:
    """One bit in the middle of the first half of a tensor; the file keeps its size."""
    stored = open_base(str(folder)).stored(tensor)
    with open(stored.path, "r+b") as file:
        file.seek(stored.start + stored.size // 4)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_one_bit_anywhere_is_another_base(base: Path) -> None:
    before = fingerprint(base)
    change(base, "model.embed_tokens.weight")
    after = fingerprint(base)
    assert after != before
    change(base, "model.embed_tokens.weight")  # back again
    assert fingerprint(base) == before


def test_bytes_are_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(base)

    def refuse(self: StoredTensor, offset: int = 0, count: int | None = None) -> bytes:
        raise AssertionError("read again")

    monkeypatch.setattr(StoredTensor, "raw", refuse)
    assert fingerprint(base) == before
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        fingerprint(base)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"file": 1}', b'{"tensors": {"lm_head.weight": "x"}}', b"\xff"])
def test_a_damaged_cache_is_none(base: Path, content: bytes) -> None:
    before = fingerprint(base)
    (kept,) = (cache_folder() / "digests").iterdir()
    kept.write_bytes(content)
    assert fingerprint(base) == before
    assert kept.read_bytes() != content


def test_no_cache_is_needed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(base)
    (tmp_path / "file").touch()
    monkeypatch.setenv("QROSA_CACHE", str(tmp_path / "file" / "below"))
    assert fingerprint(base) == before


def test_digests_are_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QROSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qrosa.base.digests._PIECE", 3)
    (tmp_path / "file").write_bytes(b"headabcdefgrest")
    tensor = StoredTensor(tmp_path / "file", "w", "U8", (7,), 4, 7)
    empty = StoredTensor(tmp_path / "file", "none", "U8", (0,), 4, 0)
    import hashlib

    expected = {tensor: hashlib.sha256(b"abcdefg").hexdigest(), empty: hashlib.sha256(b"").hexdigest()}
    assert tensor_digests([tensor, empty]) == expected
