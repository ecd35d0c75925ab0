"""The Python entry point that joins the parts: a base with trainable adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qrosa.base.adapter_io import attach_adapter, refuse_unmeasured
from qrosa.base.load import load_base
from qrosa.config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    source: str | Path,
    adapter: AdapterConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 42,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base in 4 bits and, if asked, put trainable adapters on it.

    Args:
        source: A model folder, a ``.gguf`` file or a Hugging Face id.
        adapter: The budget and its split; None loads the bare base.
        device: Where the model goes.
        seed: Source of the low-rank part's initial values.

    Returns:
        A transformers model and its tokenizer. The low-rank part is trainable at once;
        ``qrosa.select_masks(model, batches)`` adds the sparse part.

    Raises:
        InputError: A model that cannot be a base, a budget that cannot be met, or ranks by sensitivity, which only
            ``qrosa finetune`` has the rows to measure.
        StorageError: Damaged or unreadable files.
    """
    if adapter is not None:
        refuse_unmeasured(adapter)  # before the weights are read
    model, tokenizer = load_base(str(source), device)
    if adapter is not None:
        attach_adapter(model, adapter, seed)
        model.train()
    return model, tokenizer
