"""The folder that is carried to a machine with a card, and its runner."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import gpu, gpu_kit, gpu_kit_run


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit that is unpacked, whose ``bench.gpu`` is a few lines."""
    monkeypatch.setattr(gpu_kit_run, "HERE", tmp_path)
    source = tmp_path / "unpacked" / "source"
    (source / "bench" / "results").mkdir(parents=True)
    (source / "bench" / "__init__.py").touch()
    (source / "bench" / "gpu.py").write_text(
        "import pathlib, sys, time\n"
        "part = sys.argv[-1]\n"
        "print('ops layer') if part == '--list' else pathlib.Path(f'bench/results/{part}').write_text('rows')\n"
        "time.sleep(20 * (part == 'layer'))\n"
    )
    (tmp_path / "unpacked" / "whole").touch()
    return tmp_path


def test_a_part_that_hangs_is_ended_and_what_it_has_is_kept(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_kit_run, "TESTS", {})
    monkeypatch.setattr(gpu_kit_run, "MOST", 2)
    assert gpu_kit_run.main([]) == 1
    assert sorted(path.name for path in (work / "results").iterdir()) == ["layer", "ops"]
    assert capfd.readouterr().out.splitlines()[-2:] == ["layer took more than 2 s and was ended", "failed: layer"]


def test_a_part_that_is_not_there_is_told(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_kit_run.main(["--part", "opps"])
    assert ended.value.code == 2 and "no part is named opps" in capsys.readouterr().err


def test_a_part_ends_before_the_runner_ends_it() -> None:
    assert gpu.LIMIT + gpu.GRACE < gpu_kit_run.MOST < 600


def test_the_kit_can_be_carried(tmp_path: Path) -> None:
    """Under 60 MB with both libraries, and its runner finds every part."""

    if not all(list((gpu_kit.ROOT / "qrosa").glob(f"{stem}*.so")) for stem in gpu_kit.LIBRARIES):
        pytest.skip("the compiled libraries are not both built")
    assert gpu_kit.pack(tmp_path / "kit", "130") < gpu_kit.MOST
    names = zipfile.ZipFile(tmp_path / "kit" / "source.zip").namelist()
    assert {"qrosa/cli/main.py", "bench/gpu.py", "tests/card/test_first_card.py"} <= set(names)
    packed = [n for n in zipfile.ZipFile(tmp_path / "kit" / "packages.zip").namelist() if n.endswith(".so")]
    assert sum("bitsandbytes_cuda" in name for name in packed) == 1
    command = [sys.executable, "run.py", "--list"]
    done = subprocess.run(command, cwd=tmp_path / "kit", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["first-card", "op-tests", *gpu.PARTS]
