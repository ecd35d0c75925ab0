"""Rows to select masks on, out of a trainer's dataloader: its rows, as its collator makes them.

Rows are read from the dataset and collated one at a time. The dataloader itself is not iterated: it is in the middle of
an epoch, and a second pass through it would turn its sampler and its count of epochs.

Each objective has its own rows. Of pairs (TRL's DPO) and of answers judged good or bad (KTO) those that are wanted
count, as in ``qrosa finetune --objective dpo``. Where there are prompts alone (GRPO, RLOO) the model answers them
itself: the squared gradients of what it would say are its Fisher information, which a policy's gradient weighs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qrosa.errors import InputError
from qrosa.eval.generate import continue_ids, encode_messages, end_tokens, padding_token
from qrosa.masks.selection_rows import IGNORED
from qrosa.model.head import model_device
from qrosa.train.selection import selection_rows

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

ANSWER_TOKENS = 64
"""Longest answer of the model that masks are selected on: more would cost more than they say."""

Answer = Callable[[Any], Mapping[str, Any]]
"""Makes a row of ``input_ids`` and ``labels`` out of a prompt, a text or messages."""


def dataloader_rows(
    dataloader: DataLoader[Any], count: int, seed: int, answer: Answer | None = None
) -> Iterator[Mapping[str, Any]]:
    """``count`` rows of a dataloader, as ``select_masks`` takes them: a function of data set, collator and seed.

    Args:
        dataloader: A trainer's; of a data set without length the first rows are taken.
        count: Rows to draw; packed rows give several each, and those that are not wanted none.
        seed: Of the draw.
        answer: Goes on from a prompt where the rows are prompts alone.

    Raises:
        InputError: The collator gives nothing that masks could be selected on.
    """
    dataset: Any = dataloader.dataset
    drawn = selection_rows(dataset, count, seed) if hasattr(dataset, "__len__") else islice(iter(dataset), count)
    for row in drawn:
        yield from _sequences(dataloader.collate_fn([row]), answer)


def _sequences(batch: Any, answer: Answer | None) -> Iterator[Mapping[str, Any]]:
    """The rows that one row of the data set became."""
    if not isinstance(batch, Mapping):  # TRL's trainers with rewards collate nothing
        row = batch[0]
        if answer is None or not isinstance(row, Mapping) or "prompt" not in row:
            raise _no_rows(sorted(row) if isinstance(row, Mapping) else [type(row).__name__])
        yield answer(row["prompt"])
    elif batch.get("input_ids") is None:
        raise _no_rows(sorted(batch))
    elif batch.get("labels") is not None:
        yield from _apart(batch)
    else:
        yield _wanted(batch)


def _apart(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A batch as it is, or cut where its position ids begin anew: rows packed end to end must not see one another."""
    if batch.get("position_ids") is None:
        yield batch
        return
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in pairwise([*starts, len(positions)]):
            yield {"input_ids": ids[start:end], "labels": labels[start:end]}


def _wanted(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen answer of a pair, which comes first, or an answer that is judged good; none where it is not.

    Raises:
        InputError: The batch is neither.
    """
    ids, completion, good = batch["input_ids"], batch.get("completion_mask"), batch.get("label")
    if completion is None or not (good is not None or len(ids) == 2):
        raise _no_rows(sorted(batch))
    wanted = slice(0, 1) if good is None else torch.as_tensor(good).bool()
    labels = torch.where(completion.bool(), ids, IGNORED)
    return {name: value[wanted] for name, value in (*_masked(batch), ("labels", labels))}


def _masked(batch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, batch[name]) for name in ("input_ids", "attention_mask") if batch.get(name) is not None)


def _no_rows(held: list[str]) -> InputError:
    return InputError(
        f"the trainer's batches hold {', '.join(held)}: no input_ids and labels to select masks on",
        "select masks before training: qrosa.select_masks(model, batches)",
    )


def answers_itself(model: nn.Module, tokenizer: Any, *, temperature: float, longest: int, seed: int) -> Answer:
    """How a model goes on from prompts, sampled from its distribution, whatever was drawn before.

    Args:
        model: The model as it is when it answers.
        tokenizer: Its tokenizer.
        temperature: Of the samples.
        longest: Tokens of an answer; not more than ``ANSWER_TOKENS`` are made.
        seed: Of the samples: the same prompt gets the same answer.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=min(longest, ANSWER_TOKENS),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=padding_token(model, tokenizer),
    )

    def answer(prompt: Any) -> Mapping[str, Any]:
        known = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else encode_messages(tokenizer, prompt)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = continue_ids(model, torch.tensor([known], device=model_device(model)), config)[0].tolist()
        return {"input_ids": found, "labels": [IGNORED] * len(known) + found[len(known) :]}

    return answer
