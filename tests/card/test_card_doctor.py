"""``qrosa doctor`` on the stand-in card: what it says of cards, drivers and libraries that do not go together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qrosa import ops
from qrosa.cli.main import cli
from qrosa.ops import cuda_build, library
from tests.card.standin.device import StandIn

BUILT = b"qrosa-cuda-build runtime=13000 targets=sm_80 sm_89 compute_120;"
Doctor = Callable[[], tuple[int, str, dict[str, Any]]]


@pytest.fixture
def doctor(card: StandIn) -> Doctor:
    """Exit code, the table with its lines joined, and the finding on ops; the JSON says the same."""

    def run() -> tuple[int, str, dict[str, Any]]:
        table, document = (CliRunner().invoke(cli, ["doctor", *flags]) for flags in ([], ["--json"]))
        found = json.loads(document.stdout)
        assert table.exit_code == document.exit_code == (0 if found["ok"] else 1)
        checks = {check["name"]: check for check in found["checks"]}
        assert checks["card"]["found"].startswith("Stand-in") and "sm_89" in checks["card"]["found"]
        text = " ".join(table.stdout.split())
        for check in (checks["card"], checks["ops"]):
            for words in (check["found"], check["hint"] or ""):
                assert "\n" not in words and " ".join(words.split()) in text
        return table.exit_code, text, checks["ops"]

    return run


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A CUDA library that loads; the CPU's kernels are its own. The ways that a sparse gradient was asked for."""
    monkeypatch.setitem(library.libraries, "cuda", Path("_C_cuda.abi3.so"))
    ways = [0]

    def way(request: int) -> int:
        if request >= 0:
            ways.append(request)
        return ways[-1]

    registered = torch.library.Library("qrosa", "IMPL")
    registered.impl("sddmm_way", way, "CompositeExplicitAutograd")
    yield ways
    registered._destroy()


def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: int, card: cuda_build.Card) -> None:
    """A library's file beside the package, met by a driver and a card."""
    path = tmp_path / "_C_cuda.abi3.so"
    path.write_bytes(BUILT)
    find = library._find
    monkeypatch.setattr(library, "_find", lambda stem: path if "cuda" in stem else find(stem))
    monkeypatch.setattr(cuda_build.Machine, "here", lambda: cuda_build.Machine(driver, (card,)))
    for table in (library.libraries, library.notes, library.fixes):
        monkeypatch.setitem(table, "cuda", table["cuda"])
    library._load("cuda", "CUDA")


def test_all_is_well(doctor: Doctor, compiled: list[int], card: StandIn) -> None:
    code, _, found = doctor()
    assert (code, found["state"]) == (0, "ok")
    assert "cuda: _C_cuda.abi3.so (compiled)" in found["found"]
    assert compiled == [0, 1, 0, 2, 0, 1, 0, 2, 0]  # both ways and the rule again, for the table and for the JSON
    assert card.memory.allocations > 50


@pytest.mark.parametrize(
    ("driver", "capability", "said", "hint"),
    [
        (13000, (9, 0), "the library is built for sm_80, sm_89, this card is sm_90", "QROSA_CUDA_ARCHS=90"),
        (13000, (7, 5), "the kernels need a card of sm_80 or newer, this one is sm_75", "use a newer card"),
        (12080, (8, 9), "the driver is for CUDA 12.8, the library is built with CUDA 13.0", "update the driver"),
    ],
)
def test_a_library_that_cannot_serve_leaves_plain_torch(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: int, capability: Any, said: str, hint: str
) -> None:
    """Works, so the exit code is 0; the one line says why it is slow, and what to do about just that."""
    offer(monkeypatch, tmp_path, driver, capability)
    code, _, found = doctor()
    assert (code, found["state"]) == (0, "problem")
    assert f"cuda: plain torch ({said})" in found["found"] and hint in found["hint"]


def test_a_wrong_result_names_its_op(doctor: Doctor, compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sddmm

    def wrong(dy: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        found = right(dy, *rest)
        return -found if dy.is_cuda and compiled[-1] == 2 else found

    monkeypatch.setattr(ops, "sddmm", wrong)
    code, text, found = doctor()
    assert (code, found["state"]) == (1, "broken")
    assert found["found"] == "sddmm by tiles is wrong on cuda:0, by 200%" and "sddmm by gather" not in text
    assert "make clean build" in found["hint"] and "CUDA_VISIBLE_DEVICES" in found["hint"]


def test_a_launch_that_fails_names_its_op(doctor: Doctor, compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.dequant_spmm

    def fails(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.is_cuda and len(x) > 4:
            raise RuntimeError("dequant_spmm: too many resources requested for launch\nException raised from ...")
        return right(x, *rest)

    monkeypatch.setattr(ops, "dequant_spmm", fails)
    code, _, found = doctor()
    words = "dequant_spmm: too many resources requested for launch"
    assert (code, found["found"]) == (1, f"dequant_spmm of 8 rows fails on cuda:0: {words}")


def test_an_error_that_stays_is_told_once(doctor: Doctor, compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call on the card fails with the same words."""
    real, broken = torch.Tensor.cpu, []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        if self.is_cuda and (broken or self.shape == (64, 128)):
            broken.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...")
        return real(self)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    code, _, found = doctor()
    assert code == 1 and found["found"].count("illegal memory access") == 1
    assert found["found"].startswith("dequant_add, ") and "dropout fail on cuda:0" in found["found"]


def test_a_card_that_torch_has_no_code_for(card: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def item(self: torch.Tensor) -> float:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel ...")

    monkeypatch.setattr(torch.Tensor, "item", item)
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}["card"]
    assert done.exit_code == 1 and found["state"] == "broken"
    assert "torch fails on cuda:0: CUDA error: no kernel image" in found["found"]
