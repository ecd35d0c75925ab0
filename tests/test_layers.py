"""The shape of the code base, read from its imports: rooms in order, no circles, some parts light, no unpickling.

Every import counts, also those inside functions and under ``TYPE_CHECKING``: a circle that only shows at run time is a
circle for whoever reads the files.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qrosa"
FILES = sorted(ROOT.rglob("*.py"))

# The rooms, bottom up: each may import those before it. CONTRIBUTING and docs/architecture.md show the same order.
TIERS = (
    *("errors", "processor", "heap", "spinning", "quantities", "fields", "files", "config"),
    *("ops", "quant", "sparse", "adapters", "data"),
    *("base", "optim", "offload", "masks"),
    *("planner", "model", "record", "report"),
    *("eval", "export", "calibrate", "train", "measure"),
    "cli",
)
# Tables of what can be chosen. They import nothing of qrosa, so the settings may read them wherever they live.
TABLES = ("qrosa.masks.scores", "qrosa.optim.kinds", "qrosa.eval.objectives")
FACADE = ("__init__", "__main__", "api")  # `import qrosa`: the public names, from wherever they live
TORCH_FREE = (
    "qrosa",
    "qrosa.config",
    "qrosa.errors",
    "qrosa.fields",
    "qrosa.adapters.budget",
    "qrosa.base.shape_source",
    "qrosa.planner.search.solve",
    "qrosa.planner.show",
    "qrosa.cli.main",
    "qrosa.cli.options",
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = ("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load")


def _name(path: Path) -> str:
    """``qrosa.ops.schema`` for ``qrosa/ops/schema.py``, ``qrosa.ops`` for its ``__init__.py``."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at the top or inside a function, with the line; the most exact name first."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), node.lineno


def _room(module: str) -> str:
    """``ops`` for ``qrosa.ops.schema``, ``config`` for ``qrosa.config``, ``__init__`` for ``qrosa``."""
    return [*module.split("."), "__init__"][1]


def _files_used(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in _imports(path):
        if name in MODULES and name != _name(path):
            yield name, line


def test_imports_point_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = _room(module)
        if room in FACADE:
            continue
        for used, line in _files_used(path):
            below = _room(used)
            if (room, below) == ("cli", "__init__"):
                continue  # the version
            if used in TABLES:
                continue
            if below in FACADE or (below != room and TIERS.index(below) > TIERS.index(room)):
                wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {room} imports {below}")
    assert not wrong, "\n".join(wrong)


def test_tables_import_nothing() -> None:
    assert {module: list(_files_used(MODULES[module])) for module in TABLES} == {module: [] for module in TABLES}


def test_every_room_has_its_place() -> None:
    rooms = {_room(module) for module in MODULES} - set(FACADE)
    assert rooms <= set(TIERS), f"no place for {rooms - set(TIERS)}"


def test_no_circle_of_files() -> None:
    graph = {module: {used for used, _ in _files_used(path)} for module, path in MODULES.items()}
    circles = [sorted(circle) for circle in _components(graph) if len(circle) > 1]
    assert not circles, "\n".join(" <-> ".join(circle) for circle in circles)


def _components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(set(stack[cut:]))
            del stack[cut:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_a_circle_is_found() -> None:
    assert {"a", "b"} in _components({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_the_documents_name_the_same_order() -> None:
    """The line in CONTRIBUTING that starts with the first room lists all of them, in order."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    told = re.findall(r"`(\w+)`", text.partition("bottom up:")[2].partition(".\n")[0])
    assert told == [room for room in TIERS if (ROOT / room).exists() or (ROOT / f"{room}.py").exists()]


def test_the_architecture_page_shows_the_same_rooms() -> None:
    """Top down, one line a room."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    told = re.findall(
        r"^\| `(\w+)` \|", text.partition("<!-- rooms")[2].partition("<!-- end of rooms")[0], re.MULTILINE
    )
    assert sorted(told) == sorted(TIERS)
    packages = [room for room in reversed(TIERS) if (ROOT / room).is_dir()]
    assert [room for room in told if room in packages] == packages


def test_only_one_file_imports_deepspeed() -> None:
    importers = {
        str(path.relative_to(ROOT)) for path in FILES for name, _ in _imports(path) if name.split(".")[0] == "deepspeed"
    }
    assert importers <= {"optim/zero/engine.py"}


def test_no_code_of_a_model_folder_is_trusted() -> None:
    """transformers asks on the terminal whether to run a folder's code, unless it is told not to."""
    wrong = []
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = node.func
            if not isinstance(called.value, ast.Name):
                continue
            loads = called.attr in ("from_pretrained", "from_config") and called.value.id.startswith("Auto")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            told = given.get("trust_remote_code")
            if loads and not (isinstance(told, ast.Constant) and told.value is False):
                wrong.append(f"{path}:{node.lineno}: {called.value.id}.{called.attr}")
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles() -> None:
    wrong = []
    for path in FILES:
        wrong += [f"{path}:{line}: imports {name}" for name, line in _imports(path) if name.split(".")[0] in UNPICKLERS]
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                wrong += [f"{path}:{node.lineno}: {called}"] if called in UNPICKLING_CALLS else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_stays_torch_free(module: str) -> None:
    assert module in MODULES, f"{module} has moved: say here where to"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0


def test_commands_import_nothing_heavy() -> None:
    modules = [f"qrosa.cli.{path.stem}" for path in (ROOT / "cli").glob("*.py") if path.stem != "__init__"]
    heavy = ("torch", "transformers", "bitsandbytes", "datasets", "accelerate")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their base name."""
    names = [path.name for path in (ROOT.parent / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
