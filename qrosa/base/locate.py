"""Where a base is: a local folder, a ``.gguf`` file, or a Hugging Face id, fetched into the hub's cache.

One rule and one set of messages for planning, which needs config.json only, and for loading. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qrosa.errors import InputError, first_line

_HINT = "give a local folder, a .gguf file, or a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"
# What a model needs and nothing that could run: no .py, no pickles.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]


def is_gguf(path: Path) -> bool:
    """Whether a path names a ``.gguf`` file."""
    return path.suffix.lower() == ".gguf"


def locate(source: str, *, weights: bool = True) -> Path:
    """The folder or ``.gguf`` file of a base.

    Args:
        source: What the user named.
        weights: Fetch a hub model whole; else its config.json, which is enough for a plan.

    Raises:
        InputError: There is no such model.
    """
    path = Path(source).expanduser()
    if is_gguf(path) and not path.is_file():
        raise InputError(f"model file {source} does not exist", "check the path given to --model")
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        raise InputError(
            f"{source} is neither a model folder nor a .gguf file", "give the folder that holds config.json"
        )
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    if looks_local or not source.strip():
        raise InputError(f"model {source!r} does not exist", _HINT)
    return _from_hub(source, _whole if weights else _config_alone)


def _whole(source: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=_HUB_FILES))


def _config_alone(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, "config.json")).parent


def _from_hub(source: str, fetch: Callable[[str], Path]) -> Path:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return fetch(source)
    except HFValidationError:
        raise InputError(f"model {source!r} does not exist", _HINT) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"model {source!r} is no local folder and is not in the Hugging Face cache, and the hub cannot be reached",
            _HINT,
        ) from None
    except Exception as error:  # the hub client's errors differ by transport
        raise InputError(f"model {source!r} cannot be fetched: {first_line(error)}", _HINT) from None
