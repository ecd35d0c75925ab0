"""Plain fp32 models of the tiny families, and rows with labels of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qrosa.data.encode import EncodedRow

LoadTiny = Callable[[str], Any]


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Callable[..., Path]) -> LoadTiny:
    """``tiny_model("gemma2")``: the family's model in fp32, loaded once; do not change it."""
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            loaded[family] = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family), dtype=torch.float32).eval()
        return loaded[family]

    return load


def label_row(prompt: Sequence[int], answer: Sequence[int], end: Sequence[int] = ()) -> EncodedRow:
    """A row as the encoder makes it: loss on the completion and the tokens that end it."""
    ids = [*prompt, *answer, *end]
    labels = [-100] * len(prompt) + [*answer, *end]
    stop = len(prompt) + len(answer)
    return EncodedRow(ids, labels, prompt_len=len(prompt), answer_end=stop, turn_end=len(ids))


def label_rows(labels: Sequence[Sequence[int]], end: Sequence[int] = (), count: int = 24) -> list[EncodedRow]:
    """Rows with random prompts of 3 to 40 tokens and each label in turn."""
    source = random.Random(9)
    return [
        label_row([source.randrange(4, 459) for _ in range(source.randint(3, 40))], labels[index % len(labels)], end)
        for index in range(count)
    ]
