"""The one rule for the length of rows, which planning and training share; torch-free, so that a plan stays quick."""

from __future__ import annotations

from qrosa.errors import InputError

DEFAULT_SEQ_LEN = 2048


def row_length(asked: int | None, limit: int | None) -> int:
    """Tokens at which rows are cut: what was asked for, else the model's limit, at most 2048.

    Args:
        asked: ``--seq-len``, None where it was not given.
        limit: The model's ``max_position_embeddings``, None where it has none.

    Raises:
        InputError: More was asked for than the model can read.
    """
    if asked is None:
        return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if limit is not None and asked > limit:
        raise InputError(f"--seq-len {asked} is more than the model reads ({limit})", f"use at most {limit}")
    return asked
