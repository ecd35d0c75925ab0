"""Answers to a few held-out prompts, from the model as training finds it and as it leaves it.

A loss says how far; a few answers say what of. The most likely token is taken each time, so what is answered follows
from the weights alone, and no random number of the run is touched. What was answered before training lies in the run
folder, where a resumed run finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from qrosa.errors import QrosaError
from qrosa.eval.generate import end_tokens, padding_token
from qrosa.files import read_json, write_json
from qrosa.model.head import evaluating, model_device
from qrosa.planner.workload import SAMPLE_TOKENS
from qrosa.record.folder import SAMPLES_FILE
from qrosa.train.step import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from qrosa.data.encode import EncodedRow
    from qrosa.train.prepare import Prepared


def with_prompts(rows: Sequence[EncodedRow], group: int, count: int) -> list[EncodedRow]:
    """The first ``count`` rows that have a prompt and an answer, one of each ``group`` that belong together."""
    found: list[EncodedRow] = []
    for index in range(0, len(rows), group):
        if len(found) == count:
            break
        row = rows[index]
        if row.prompt_len and row.prompt_len < len(row.input_ids):
            found.append(row)
    return found


class Samples:
    """The samples of one run.

    Args:
        folder: The run folder.
        rows: From `with_prompts`.
        longest: Tokens that a prompt and its answer may have together.
        tokenizer: The base's.
        notice: Told if there are none, or no memory for them.
    """

    def __init__(
        self, folder: Path, rows: Sequence[EncodedRow], longest: int, tokenizer: Any, notice: Callable[[str], None]
    ) -> None:
        self.path = folder / SAMPLES_FILE
        self.rows = rows
        self.longest = longest
        self.tokenizer = tokenizer
        self.notice = notice

    def before(self, model: nn.Module) -> None:
        """Answer with the model as it is and keep that in the run folder."""
        if not self.rows:
            self.notice("none of the held-out rows has a prompt: --samples shows nothing")
            return
        write_json(self.path, {"before": self._answers(model)})

    def after(self, model: nn.Module) -> list[dict[str, Any]]:
        """Answer again.

        Returns:
            ``{"where", "prompt", "wanted", "before", "after"}`` of each row; None for an answer that is not known.
        """
        try:
            kept = read_json(self.path).get("before")
        except QrosaError:
            kept = None
        before = kept if isinstance(kept, list) and len(kept) == len(self.rows) else [None] * len(self.rows)
        return [
            {
                "where": row.where,
                "prompt": self._text(row.input_ids[: row.prompt_len]),
                "wanted": self._text(row.input_ids[row.prompt_len : row.turn_end]),
                "before": first,
                "after": then,
            }
            for row, first, then in zip(self.rows, before, self._answers(model), strict=True)
        ]

    def _answers(self, model: nn.Module) -> list[str | None]:
        try:
            return [self._answer(model, row) for row in self.rows]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        self.notice("there is no memory for --samples: answers are left out")
        return [None] * len(self.rows)

    def _answer(self, model: nn.Module, row: EncodedRow) -> str:
        from transformers import GenerationConfig

        prompt = row.input_ids[: row.prompt_len]
        config = GenerationConfig(
            max_new_tokens=max(1, min(SAMPLE_TOKENS, self.longest - len(prompt))),
            do_sample=False,
            eos_token_id=sorted(end_tokens(model, self.tokenizer)) or None,
            pad_token_id=padding_token(model, self.tokenizer),
        )
        ids = torch.tensor([prompt], device=model_device(model))
        with evaluating(model):
            found = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return self._text(found[0, len(prompt) :].tolist())

    def _text(self, tokens: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ).strip()


def make_samples(prepared: Prepared, notice: Callable[[str], None]) -> Samples:
    """The samples that a run's settings ask for."""
    heldout, config = prepared.heldout, prepared.config
    assert heldout is not None  # checked before
    rows = with_prompts(heldout.rows, heldout.group, config.train.samples)
    return Samples(Path(config.output), rows, prepared.plan.work.answered_length, prepared.tokenizer, notice)
