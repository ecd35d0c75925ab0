"""The streaming writer against the safetensors library, and the folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qrosa.errors import InputError, StorageError
from qrosa.export import folder as folders
from qrosa.export import shards
from qrosa.export.folder import check_target, export_folder
from qrosa.export.shards import INDEX_FILE, TensorSpec, plan_shards, write_shards
from qrosa.files import read_safetensors_header


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed": (7, 5), "odd": (3, 3, 3), "empty": (0, 4), "one": (1,), "scalar": (), "transposed": (4, 6)}
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    made["transposed"] = made["transposed"].T
    return made


def _specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_single_file_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = _tensors()
    total = write_shards(tmp_path, plan_shards(_specs(tensors)), tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert list(sorted(loaded)) == sorted(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    _, offset = read_safetensors_header(tmp_path / "model.safetensors")
    assert offset % 8 == 0
    assert total == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).view(3, 4).to(dtype)
    write_shards(tmp_path, plan_shards([TensorSpec("w", dtype, (3, 4))]), [("w", tensor)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def test_shards_and_index_as_transformers_names_them(tmp_path: Path) -> None:
    tensors = {f"w{index}": torch.full((10,), index, dtype=torch.float16) for index in range(5)}
    tensors["large"] = torch.ones(100, dtype=torch.float16)
    plan = plan_shards(_specs(tensors), max_bytes=50)
    total = write_shards(tmp_path, plan, tensors.items())
    names = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == total == 5 * 20 + 200
    assert index["weight_map"]["large"] == names[3]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for index in range(8):
            most = max(most, len(alive))
            tensor = torch.full((1000,), index, dtype=torch.float16)
            alive.add(tensor)
            yield f"w{index}", tensor
            del tensor

    specs = [TensorSpec(f"w{index}", torch.float16, (1000,)) for index in range(8)]
    write_shards(tmp_path, plan_shards(specs, max_bytes=5000), stream())
    assert most == 0, "an earlier tensor was still held when the next one was made"


@pytest.mark.parametrize(
    "given",
    [
        [("other", torch.zeros(2))],
        [("w", torch.zeros(3))],
        [("w", torch.zeros(2, dtype=torch.float16))],
        [],
        [("w", torch.zeros(2)), ("more", torch.zeros(2))],
    ],
    ids=["name", "shape", "dtype", "too few", "too many"],
)
def test_tensors_must_be_those_announced(tmp_path: Path, given: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError):
        write_shards(tmp_path, plan_shards([TensorSpec("w", torch.float32, (2,))]), given)


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_write_in_pieces", full)
    with pytest.raises(StorageError, match=r"cannot be written: No space left"):
        write_shards(tmp_path, plan_shards([TensorSpec("w", torch.float32, (2,))]), [("w", torch.zeros(2))])
    assert list(tmp_path.iterdir()) == []


def test_a_fault_while_reading_is_not_called_a_write_fault(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError(errno.EIO, "the base's disk")
        yield

    with pytest.raises(OSError, match="the base's disk"):
        write_shards(tmp_path, plan_shards([TensorSpec("w", torch.float32, (2,))]), stream())
    assert list(tmp_path.iterdir()) == []


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with export_folder(target, nbytes=10) as partial:
        assert not target.exists()
        (partial / "model.safetensors").write_bytes(b"x")
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["failure", "interrupt"])
def test_folder_leaves_nothing_when_the_work_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), export_folder(tmp_path / "new" / "deep" / "out", nbytes=10) as partial:
        (partial / "model.safetensors").write_bytes(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_export_is_refused_then_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with export_folder(target, nbytes=1) as partial:  # an empty folder is no obstacle
        (partial / "config.json").write_text("old")
    with pytest.raises(InputError, match="exists and is not empty") as caught, export_folder(target, nbytes=1):
        pass
    assert "--force" in caught.value.hint
    with export_folder(target, nbytes=1, force=True) as partial:
        (partial / "model.safetensors").write_text("new")
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_keeps_the_old_export_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError), export_folder(target, nbytes=1, force=True):
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"


@pytest.mark.parametrize("foreign", ["thesis.docx", ".git", "checkpoints"])
def test_force_does_not_replace_other_peoples_files(tmp_path: Path, foreign: str) -> None:
    target = tmp_path / "out"
    (target / foreign).mkdir(parents=True)
    with pytest.raises(InputError, match="which no export wrote"):
        check_target(target, force=True)


def test_output_that_holds_what_is_read_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    for target in (base, tmp_path / "models"):
        with pytest.raises(InputError, match="which the export reads"):
            check_target(target, force=True, keep=(base,))
    check_target(base / "merged", force=False, keep=(base,))


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with export_folder(tmp_path / "link", nbytes=1) as partial:
        (partial / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "out", force=True)


def test_too_little_disk_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 10**9))
    with (
        pytest.raises(StorageError, match=r"takes 14.96 GiB and 2.79 GiB is free") as caught,
        export_folder(tmp_path / "out", nbytes=16 * 10**9),
    ):
        pass
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # permission bits do not bind root
    with pytest.raises(StorageError, match="Permission denied"), export_folder(tmp_path / "out", nbytes=1):
        pass
    assert shutil.os.listdir(tmp_path) == []
