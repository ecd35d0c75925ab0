"""Measure what an export lost: the trained model against the exported folder, on real rows.

The export runs as its users run it, through plain transformers in its own dtype or through llama.cpp, so that what 16
bits cost, in weights and in arithmetic, is in the figures (on a processor that is slow in 16 bits transformers computes
in fp32, and what the weights lost is in them). The trained model runs through qrosa, 4-bit base and all, with fp32
activations: computed in bf16 it would differ from itself by more than a faithful export does. One runs after the other:
of the trained model the rows' hidden states and the head are kept, from which its logits can be made again, and the
rest is let go before the export is loaded. The peak is one model and a head. Where the 16-bit model that the base was
made of is at hand, it runs last, and the export is compared with it too: what 4 bits and the training changed together.

Agreement and KL are over every predicted token of the rows, prompts included, since a drift shows wherever the model
predicts; the losses are over the supervised tokens, as everywhere else.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrosa.base.adapter_io import load_adapter, load_run_or_model
from qrosa.base.load import load_base
from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.errors import InputError
from qrosa.export.card import Drift
from qrosa.export.folder import GGUF_FILE
from qrosa.export.llama_cpp import LlamaCppLogits
from qrosa.model.head import CHUNK_TOKENS, Head, decoder_output, evaluating, model_device
from qrosa.ops.products import widens

VERIFY_ROWS = 32


@dataclass
class _Recorded:
    """A model's predictions, in a form from which logits are made again.

    Attributes:
        hidden: One [T, d] a row, on the CPU.
        head: Makes logits of them.
    """

    hidden: Iterable[Tensor]
    head: Head | _Logits


class _Logits:
    """The head of what is logits already."""

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@dataclass
class _Sums:
    tokens: int = 0
    supervised: int = 0
    same: int = 0
    kl: float = 0.0
    trained: float = 0.0
    exported: float = 0.0


def verify(
    source: str | Path,
    exported: str | Path,
    rows: Sequence[EncodedRow],
    *,
    model: str | None = None,
    original: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Drift:
    """Compare a run with its export, and the export with the 16-bit model that its base was made of.

    Args:
        source: The run or adapter folder.
        exported: The folder that was exported from it.
        rows: Encoded rows, at most a few dozen.
        model: Where the base is now, if it has moved since the training.
        original: Folder of the 16-bit model, None where it is not at hand.
        device: Where the models run.
        progress: Called with what is being done.

    Returns:
        The drift.

    Raises:
        InputError: No rows, none with a supervised token, or an export that computes NaN.
    """
    if not any(label != IGNORE for row in rows for label in row.labels[1:]):
        raise InputError("there are no supervised tokens to verify on", "give other rows with --data")
    say = progress or (lambda _: None)
    say("running the trained model")
    trained = _record(_load_trained(source, model, device), rows)
    gc.collect()
    say("running the exported model")
    found = _exported(Path(exported), rows, device)
    drift = compare(trained, found, rows)
    if not math.isfinite(drift["mean_kl"]):
        raise InputError(
            f"the model in {exported} was written, but its activations overflow on these rows",
            "export again with --dtype bf16 --force",
        )
    if original is not None:
        del trained
        gc.collect()
        say("running the 16-bit model")
        against = compare(_record(_load_plain(original, device), rows), found, rows)
        drift["original"] = {
            "top1_agreement": against["top1_agreement"],
            "mean_kl": against["mean_kl"],
            "loss": against["loss_trained"],
        }
    return drift


def _exported(folder: Path, rows: Sequence[EncodedRow], device: torch.device | str) -> _Recorded:
    """The export's predictions, by the library that its users have."""
    if not (folder / GGUF_FILE).is_file():
        return _record(_load_plain(folder, device), rows)
    return _Recorded(LlamaCppLogits(folder / GGUF_FILE, rows), _Logits())


def compare(trained: _Recorded, exported: _Recorded, rows: Sequence[EncodedRow]) -> Drift:
    """The drift between two recordings of the same rows."""
    sums = _Sums()
    with torch.no_grad():
        for p_hidden, q_hidden, row in zip(trained.hidden, exported.hidden, rows, strict=True):
            for start in range(0, p_hidden.shape[0], CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                labels = torch.tensor(row.labels[1:][chunk])
                p = torch.log_softmax(trained.head.logits(p_hidden[chunk]), dim=-1).cpu()
                q = torch.log_softmax(exported.head.logits(q_hidden[chunk]), dim=-1).cpu()
                _add(sums, p, q, labels)
    return {
        "rows": len(rows),
        "tokens": sums.tokens,
        "supervised_tokens": sums.supervised,
        "top1_agreement": sums.same / sums.tokens,
        "mean_kl": sums.kl / sums.tokens,
        "loss_trained": sums.trained / sums.supervised,
        "loss_exported": sums.exported / sums.supervised,
        "loss_difference": (sums.exported - sums.trained) / sums.supervised,
        "original": None,
    }


def _add(sums: _Sums, p: Tensor, q: Tensor, labels: Tensor) -> None:
    """Add a chunk: log-probabilities [t, V] of the trained and the exported model, labels [t]."""
    sums.tokens += p.shape[0]
    sums.same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    sums.kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    supervised = (labels != IGNORE).nonzero().squeeze(1)
    picked = labels[supervised, None]
    sums.supervised += len(supervised)
    sums.trained -= float(p[supervised].gather(1, picked).sum(dtype=torch.float64))
    sums.exported -= float(q[supervised].gather(1, picked).sum(dtype=torch.float64))


def _record(model: nn.Module, rows: Sequence[EncodedRow]) -> _Recorded:
    """Hidden states of every position that predicts a token, a row at a time, without padding."""
    device = model_device(model)
    hidden = []
    with evaluating(model):
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            output = decoder_output(model, ids, torch.ones_like(ids), use_cache=False)
            hidden.append(output.last_hidden_state[0, :-1].cpu())
    return _Recorded(hidden, Head.of(model))


def _load_trained(source: str | Path, model: str | None, device: torch.device | str) -> nn.Module:
    if model is None:
        return cast(nn.Module, load_run_or_model(str(source), device)[0].float())
    loaded, _ = load_base(model, device)
    load_adapter(loaded, source)
    return cast(nn.Module, loaded.eval().float())


def _load_plain(folder: str | Path, device: torch.device | str) -> nn.Module:
    """The exported folder, as anybody would load it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto")
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    model = cast(Any, model).to(device).eval()
    weight = model.get_input_embeddings().weight
    return _rounding(model, weight.dtype) if widens(weight) else cast(nn.Module, model)


def _rounding(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Have a model compute in fp32, and its modules pass on what ``dtype`` can hold: overflow shows, too."""

    def held(value: Any) -> Any:
        return value.to(dtype).float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(held(value) for value in inputs)

    for name, module in model.named_modules():
        if name:  # the logits are the head's
            module.register_forward_pre_hook(before)
            module.register_forward_hook(lambda _, __, output: held(output))
    return model.float()
