"""A ``.gguf`` file's predictions, by llama.cpp itself (llama-cpp-python), for ``export --verify``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qrosa.data.encode import EncodedRow
from qrosa.errors import InputError, StorageError, install_hint

_TRIAL = """
import sys
from llama_cpp import Llama
Llama(sys.argv[1], n_ctx=8, n_batch=8, n_threads=1, verbose=False).eval([0])
"""


def require_llama_cpp() -> None:
    """Refuse before anything is written.

    Raises:
        InputError: llama-cpp-python is not installed.
    """
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        raise InputError("--verify of a GGUF file needs llama-cpp-python", install_hint("llama-cpp")) from None


class LlamaCppLogits:
    """Logits of rows, a row at a time, each time it is iterated: fp32 [T - 1, V] of the positions that predict a token.

    Args:
        file: The ``.gguf`` file.
        rows: What to run.

    Raises:
        InputError: llama-cpp-python is not installed.
        StorageError: llama.cpp does not take the file.
    """

    def __init__(self, file: Path, rows: Sequence[EncodedRow]) -> None:
        require_llama_cpp()
        from llama_cpp import Llama

        _refuse_crash(file)
        longest = max(len(row.input_ids) for row in rows)
        threads = torch.get_num_threads()
        try:
            self._model = Llama(
                str(file), n_ctx=longest, n_batch=longest, logits_all=True, n_threads=threads, verbose=False
            )
        except (ValueError, RuntimeError):
            raise StorageError(f"llama.cpp does not take {file}", "update llama-cpp-python") from None
        self._rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        for row in self._rows:
            self._model.reset()
            self._model.eval(row.input_ids)
            yield torch.from_numpy(self._model.scores[: len(row.input_ids) - 1].copy())


def _refuse_crash(file: Path) -> None:
    """Read one token in a process of its own: some builds of llama.cpp crash on a block type, and would take us along.

    Raises:
        StorageError: It does.
    """
    tried = subprocess.run([sys.executable, "-c", _TRIAL, str(file)], capture_output=True, check=False)
    if tried.returncode < 0:
        raise StorageError(
            f"{file} was written, but llama.cpp crashes on it (signal {-tried.returncode})",
            "verify with --quant f16, or with another build of llama-cpp-python",
        )
