"""Open a base, whatever it is: a local folder, a ``.gguf`` file, or a Hugging Face id, fetched first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qrosa.base.base_files import BaseFiles, SafetensorsBase, text_model_config
from qrosa.base.checkpoint import open_checkpoint
from qrosa.base.locate import is_gguf, locate
from qrosa.base.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def open_base(source: str) -> BaseFiles:
    """Open a base: a local folder, a ``.gguf`` file, or a Hugging Face id.

    Raises:
        InputError: There is no such model, or it is of a kind that cannot be a base.
        StorageError: Its files are damaged or unreadable.
    """
    path = locate(source)
    if is_gguf(path):
        from qrosa.base.gguf import GGUFBase
        from qrosa.base.gguf_file import open_gguf

        return GGUFBase(source, open_gguf(source, path))
    return SafetensorsBase(open_checkpoint(source, path))


def open_config(source: str) -> PretrainedConfig:
    """A base's transformers config, of the text model alone; the weights need not be there.

    Raises:
        InputError: There is no such model, or it is of a kind that cannot be a base.
        StorageError: Its files are damaged.
    """
    path = locate(source, weights=False)
    return (
        open_base(source).config if is_gguf(path) else text_model_config(open_checkpoint(source, path, weights=False))
    )


def open_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A base's tokenizer; the weights need not be there.

    Raises:
        InputError: No such model, or no usable tokenizer.
        StorageError: A damaged ``.gguf`` file.
    """
    path = Path(source).expanduser()
    if is_gguf(path):
        return open_base(source).tokenizer()
    return load_tokenizer(source, path if path.is_dir() else source)
