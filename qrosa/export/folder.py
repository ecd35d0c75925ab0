"""An output folder that appears whole or not at all.

Everything is written into ``DIR.partial-<pid>`` beside DIR, on the same file system, and one rename makes it DIR. A
process that is killed leaves the partial folder behind, never a DIR that looks complete; the next export to DIR removes
it, and brings back what was moved aside. What ``--force`` may replace is kept narrow: a folder of files as an export
writes them. One with sub-folders or other files is somebody's work.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qrosa.errors import InputError, StorageError
from qrosa.export.shards import storage_errors
from qrosa.quantities import bytes_text

_EXPORT_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".md")
GGUF_FILE = "model.gguf"
MODELFILE = "Modelfile"  # ollama's, beside a .gguf file
_ROOM_FOR_SMALL_FILES = 64 * 2**20  # tokenizer, config and card; the largest tokenizers take some 35 MB


@contextmanager
def export_folder(target: Path, *, nbytes: int, force: bool = False, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well and is removed when it does not.

    Args:
        target: The folder to make; its parents are made too.
        nbytes: Tensor bytes that will be written, to check the free disk first.
        force: Replace an earlier export. Without it a non-empty target is refused.
        keep: Folders that are read while exporting; a target that is or holds one of them is refused.

    Raises:
        InputError: The target exists, is a file, or holds what is being read.
        StorageError: Too little disk is free, or the folder cannot be written.
    """
    target = target.resolve()  # a link stays, what it points to is made
    _clear_up(target)
    check_target(target, force=force, keep=keep)
    check_disk(target, nbytes)
    made = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    done = False
    try:
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        yield partial
        with storage_errors(target):
            _put_in_place(partial, target)
        done = True
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:  # the deepest first; stops at the first that somebody else has used
                if not _removed(parent):
                    break


def _clear_up(target: Path) -> None:
    """Remove what exports to this target left that were killed, and put back the folder that one had moved aside."""
    for kind in ("old", "partial"):
        for left in target.parent.glob(f"{glob.escape(target.name)}.{kind}-*"):
            process = left.name.rpartition("-")[2]
            if not process.isdecimal() or left.is_symlink() or not left.is_dir() or _is_alive(int(process)):
                continue
            foreign = any(e.suffix != ".partial" and not _is_ours(e) for e in left.iterdir())
            if kind == "old" and not target.exists():
                os.replace(left, target)
            elif not foreign:
                shutil.rmtree(left, ignore_errors=True)


def _is_ours(entry: Path) -> bool:
    return entry.is_file() and (entry.suffix in _EXPORT_SUFFIXES or entry.name == MODELFILE)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def check_target(target: Path, *, force: bool, keep: tuple[Path, ...] = ()) -> None:
    """Refuse a target that would destroy something.

    Raises:
        InputError: See `export_folder`.
    """
    resolved = target.resolve()
    for path in keep:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise InputError(f"output {target} holds {path}, which the export reads", "give another --output")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"output {target} is a file", "give a folder as --output")
    with storage_errors(target):
        entries = sorted(target.iterdir())
    if not entries:
        return
    if not force:
        raise InputError(f"output {target} exists and is not empty", "give another --output, or --force to replace it")
    foreign = [entry.name for entry in entries if not _is_ours(entry)]
    if foreign:
        raise InputError(
            f"output {target} holds {foreign[0]!r}, which no export wrote, so --force does not replace it",
            "give another --output, or remove the folder yourself",
        )


def check_disk(target: Path, nbytes: int) -> None:
    """Compare what will be written with what is free.

    Raises:
        StorageError: Too little room.
    """
    existing = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = nbytes + _ROOM_FOR_SMALL_FILES
    if needed > free:
        raise StorageError(
            f"the export takes {bytes_text(needed)} and {bytes_text(free)} is free in {existing}",
            "free some disk, or give an --output on another disk",
        )


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename, moving an earlier export aside first so that a failed rename can bring it back."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
