"""The shape of the code base, read from its imports: layers point down, some parts stay light, nothing unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qrosa"
FILES = sorted(ROOT.rglob("*.py"))

TIERS = {
    "ops": 0,
    "quant": 1,
    "sparse": 1,
    "adapters": 2,
    "data": 2,
    "base": 3,
    "masks": 3,
    "offload": 3,
    "memory": 4,
    "eval": 4,
    "export": 4,
    "train": 4,
    "cli": 5,
}
# Neighbours that one of a tier may use: repair reads the 16-bit base, training plans and evaluates, export verifies.
ALLOWED_SIDEWAYS = {("masks", "base"), ("train", "memory"), ("train", "eval"), ("export", "eval")}
LEAVES = ("config", "errors", "fields", "quantities")
FACADE = ("__init__", "api")  # `import qrosa`: the public names, from wherever they live
TORCH_FREE = (
    "qrosa",
    "qrosa.config",
    "qrosa.errors",
    "qrosa.fields",
    "qrosa.adapters.budget",
    "qrosa.base.shape",
    "qrosa.planner.bytes.phases",
    "qrosa.planner.search.solve",
    "qrosa.cli.main",
    "qrosa.cli.options",
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at the top or inside a function, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield str(node.module), node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def _part(path: Path) -> str:
    """``ops`` for ``qrosa/ops/schema.py``, ``config`` for ``qrosa/config.py``."""
    relative = path.relative_to(ROOT).with_suffix("")
    return relative.parts[0]


def _parts_used(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in _imports(path):
        pieces = name.split(".")
        if pieces[0] == "qrosa" and len(pieces) > 1:
            yield pieces[1], line


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = _part(path)
    if part in FACADE:
        return  # checked below: nothing may import the facade
    for used, line in _parts_used(path):
        where = f"qrosa/{path.relative_to(ROOT)}:{line}"
        if used in LEAVES or used == part:
            assert part not in LEAVES or used in LEAVES, f"{where}: a leaf imports {used}"
            continue
        if used not in TIERS:
            assert used == "__version__", f"{where}: imports qrosa.{used}, which is in no tier"
            continue
        assert part not in LEAVES, f"{where}: {part}.py is a leaf and imports {used}"
        down = TIERS[used] < TIERS[part] or (part, used) in ALLOWED_SIDEWAYS
        assert down, f"{where}: {part} (tier {TIERS[part]}) imports {used} (tier {TIERS[used]})"


def test_every_package_has_a_tier() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(TIERS), f"no tier for {packages - set(TIERS)}"


def test_only_one_file_imports_deepspeed() -> None:
    importers = {
        str(path.relative_to(ROOT)) for path in FILES for name, _ in _imports(path) if name.split(".")[0] == "deepspeed"
    }
    assert importers <= {"offload/deepspeed.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    for name, line in _imports(path):
        assert name.split(".")[0] not in UNPICKLERS, f"{path}:{line}: imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"), (
                f"{path}:{node.lineno}: {called}"
            )


def _exists(module: str) -> bool:
    relative = Path(*module.split(".")[1:])
    return module == "qrosa" or (ROOT / relative).with_suffix(".py").exists()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_stays_torch_free(module: str) -> None:
    assert _exists(module), f"{module} has moved: say here where to"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0


def test_commands_import_nothing_heavy() -> None:
    modules = [f"qrosa.cli.{path.stem}" for path in (ROOT / "cli").glob("*.py") if path.stem != "__init__"]
    heavy = ("torch", "transformers", "bitsandbytes", "datasets", "accelerate")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
