"""``model.save_pretrained`` of a loaded base: its adapter, or a refusal.

transformers would write the state dict, in which packed weights are no parameters: a folder without the base, which
loads again as noise, without a word. Trainers and ``push_to_hub`` save by the same method, so they too get the adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError

if TYPE_CHECKING:
    from torch import nn

SaveAdapter = Callable[["nn.Module", "str | Path"], None]


class SavesAdapter:
    """Takes the place of one model's ``save_pretrained``.

    Args:
        model: The model; not kept alive.
        save: Writes its adapter; None while it has none.
    """

    def __init__(self, model: nn.Module, save: SaveAdapter | None) -> None:
        self._model = weakref.ref(model)
        self._save = save

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **_: Any) -> None:
        """Write the adapter into ``save_directory``; what else ``save_pretrained`` may be told has no meaning here.

        Raises:
            InputError: The model has no adapter.
            StorageError: The folder cannot be written.
        """
        model = self._model()
        if self._save is None or model is None:
            raise InputError(
                "a 4-bit base has no weights that save_pretrained could write",
                "save an adapter (qrosa.save_adapter), or write a whole model (qrosa.merge, qrosa export)",
            )
        if is_main_process:
            self._save(model, save_directory)
