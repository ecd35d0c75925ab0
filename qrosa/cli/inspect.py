"""``qrosa inspect``: what an adapter holds, read from its two files alone.

Ranks and counts are taken from the tensors' header and compared with the config, so a folder whose parts do not belong
together is found out; no tensor is read and no base is opened.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.failures import printable
from qrosa.cli.options import emit_json, json_option, result_console
from qrosa.errors import StorageError
from qrosa.quantities import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = """\b
Examples:
  qrosa inspect run
  qrosa inspect run/adapter --modules
  qrosa inspect run --json
"""


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="RUN-OR-ADAPTER")
@click.option("--modules", is_flag=True, help="List every module, not only kinds of modules.")
@json_option
def command(source: str, modules: bool, as_json: bool) -> None:
    """Show what an adapter holds: its base, ranks, densities, sparse values and bytes per module."""
    document = describe_adapter(source)
    if as_json:
        emit_json(document)
    else:
        _show(result_console(), document, every=modules)


def describe_adapter(source: str | Path) -> dict[str, Any]:
    """What the adapter of a run holds.

    Returns:
        ``{"adapter", "base": {"source", "fingerprint", "kind", "parameters"}, "settings", "trainable", "share",
        "rank": {"min", "max"}, "nnz", "density", "bytes", "modules": {path: {"rank", "alpha", "nnz", "density",
        "shape", "trainable", "bytes"}}}``; density is over the weights of the modules listed.

    Raises:
        InputError: There is no adapter.
        StorageError: Its files are damaged or do not belong together.
    """
    from qrosa.adapters.forms import with_shared
    from qrosa.base.adapter_io import adapter_folder
    from qrosa.files import read_safetensors_header
    from qrosa.sparse.store import ADAPTER_FILE, read_adapter_config

    folder = adapter_folder(source)
    config = read_adapter_config(folder)
    header, _ = read_safetensors_header(folder / ADAPTER_FILE)
    held, entries = _held(header), config["modules"]
    if unknown := held.keys() - entries.keys():
        raise _mismatch(folder, min(unknown))
    whole = with_shared(held, {path: tuple(entry["shape"]) for path, entry in entries.items()})
    modules = {
        path: _module(folder, path, entry, whole.get(path, {}), held.get(path, {})) for path, entry in entries.items()
    }
    ranks = [module["rank"] for module in modules.values()]
    nnz = sum(module["nnz"] for module in modules.values())
    weights = sum(module["shape"][0] * module["shape"][1] for module in modules.values())
    trainable = sum(module["trainable"] for module in modules.values())
    parameters = config["base"].get("parameters")
    return {
        "adapter": str(folder),
        "base": config["base"],
        "settings": config["adapter"],
        "trainable": trainable,
        "share": trainable / parameters if parameters else None,
        "rank": {"min": min(ranks, default=0), "max": max(ranks, default=0)},
        "nnz": nnz,
        "density": nnz / weights if weights else 0.0,
        "bytes": (folder / ADAPTER_FILE).stat().st_size,
        "modules": modules,
    }


def _held(header: Any) -> dict[str, dict[str, tuple[tuple[int, ...], int]]]:
    """Module path -> tensor name -> (shape, bytes)."""
    held: dict[str, dict[str, tuple[tuple[int, ...], int]]] = defaultdict(dict)
    for name, (_, shape, (first, end)) in header.items():
        path, _, leaf = name.rpartition(".")
        held[path][leaf] = (shape, end - first)
    return dict(held)


_Tensors = dict[str, tuple[tuple[int, ...], int]]


def _module(folder: Path, path: str, entry: Any, tensors: _Tensors, own: _Tensors) -> dict[str, Any]:
    """One module's figures, from its tensors; those that it shares count where they stand in the file, in ``own``.

    Raises:
        StorageError: They are not what the config says.
    """
    from qrosa.adapters.forms import of_low_rank, saved_rank

    low_rank = {name: shape for name, (shape, _) in of_low_rank(tensors).items()}
    rank = saved_rank(low_rank)
    nnz = tensors["sparse_values"][0][0] if "sparse_values" in tensors else 0
    try:
        rows, columns = (int(size) for size in entry["shape"])
        same = (int(entry["rank"]), int(entry["nnz"])) == (rank, nnz)
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise _mismatch(folder, path)
    return {
        "rank": rank,
        "alpha": entry.get("alpha"),
        "nnz": nnz,
        "density": nnz / (rows * columns),
        "shape": [rows, columns],
        "trainable": nnz + sum(math.prod(shape) for shape, _ in of_low_rank(own).values()),
        "bytes": sum(size for _, size in own.values()),
    }


def _mismatch(folder: Path, path: str) -> StorageError:
    return StorageError(
        f"the config and the tensors of the adapter in {folder} do not belong together (see {path})",
        "copy the adapter folder again",
    )


def _show(console: Console, document: dict[str, Any], *, every: bool) -> None:
    from rich.table import Table

    base, rank = document["base"], document["rank"]
    share = f", {100 * document['share']:.3g}% of the base's {base['parameters']:,}" if document["share"] else ""
    ranks = str(rank["max"]) if rank["min"] == rank["max"] else f"{rank['min']} to {rank['max']}"
    for key, value in (
        ("adapter", document["adapter"]),
        ("base", f"{base.get('source')} ({base.get('kind')})"),
        ("fingerprint", base.get("fingerprint")),
        ("trainable", f"{document['trainable']:,} parameters{share}"),
        ("rank", ranks),
        ("sparse", f"{document['nnz']:,} values, density {100 * document['density']:.3g}%"),
        ("size", bytes_text(document["bytes"])),
    ):
        console.print(printable(f"{key:12} {value}"), markup=False, soft_wrap=True)
    table = Table("module", box=None, header_style="bold")
    for name in ("count", "rank", "sparse values", "density", "bytes"):
        table.add_column(name, justify="right")
    for name, group in _groups(document["modules"], every=every).items():
        table.add_row(name, *_row(group))
    console.print()
    console.print(table)


def _groups(modules: dict[str, Any], *, every: bool) -> dict[str, list[Any]]:
    """Modules by kind (the last part of the path), or one by one."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for path, module in modules.items():
        groups[path if every else path.rpartition(".")[2]].append(module)
    return groups


def _row(group: list[Any]) -> tuple[str, ...]:
    ranks = sorted({module["rank"] for module in group})
    nnz = sum(module["nnz"] for module in group)
    weights = sum(module["shape"][0] * module["shape"][1] for module in group)
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    size = sum(module["bytes"] for module in group)
    return (str(len(group)), shown, f"{nnz:,}", f"{100 * nnz / weights:.3g}%", f"{size:,}")
