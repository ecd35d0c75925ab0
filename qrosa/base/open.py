"""Which kind of base a source is: a local folder, a ``.gguf`` file, or a Hugging Face id, fetched first."""

from __future__ import annotations

from pathlib import Path

from qrosa.base.base_files import BaseFiles, SafetensorsBase, first_line
from qrosa.errors import InputError

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]


def open_base(source: str) -> BaseFiles:
    """Open a base: a local folder, a ``.gguf`` file, or a Hugging Face id.

    Raises:
        InputError: There is no such model, or it is of a kind that cannot be a base.
        StorageError: Its files are damaged or unreadable.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        from qrosa.base.gguf import GGUFBase

        return GGUFBase(source, path)
    if path.is_dir():
        return SafetensorsBase(source, path)
    if path.exists():
        raise InputError(
            f"{source} is neither a model folder nor a .gguf file", "give the folder that holds config.json"
        )
    return SafetensorsBase(source, _download(source))


def _download(source: str) -> Path:
    """Fetch the text files and safetensors of a hub model into the hub's cache."""
    hint = "give a local folder, a .gguf file, or a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    if looks_local or not source.strip():
        raise InputError(f"model {source!r} does not exist", hint)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise InputError(f"model {source!r} does not exist", hint) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"model {source!r} is no local folder and is not in the Hugging Face cache, and the hub cannot be reached",
            hint,
        ) from None
    except Exception as error:  # the hub client's errors differ by transport
        raise InputError(f"model {source!r} cannot be fetched: {first_line(error)}", hint) from None
