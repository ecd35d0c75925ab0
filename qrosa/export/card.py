"""The model card of an export: how the weights were made, and how far they are from what was trained.

Only facts that the adapter's own files and the measurement hold. A local path says nothing to whoever receives the
folder, so a base that was a folder is named by its last part and its fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from qrosa.files import write_text

CARD_FILE = "README.md"
_KINDS = {
    "dense": "quantised to NF4 with double quantisation when it was loaded",
    "nf4": "an NF4 checkpoint of bitsandbytes",
    "gguf": "a GGUF file, quantised again to NF4 when it was loaded",
}
_MERGED_INTO = {
    "nf4": "the base as it was trained on (the NF4 round trip)",
    "original": "the original weights of the checkpoint, not the 4-bit base that was trained on",
}


class FromOriginal(TypedDict):
    """How far an export is from the 16-bit model that its base was made of: what 4 bits and the training changed."""

    top1_agreement: float
    mean_kl: float
    loss: float


class Drift(TypedDict):
    """How far an export is from the model that was trained, measured on rows.

    ``loss`` entries are means per supervised token in nats; agreement and KL are over all predicted tokens.
    ``original`` is None where the 16-bit model is not at hand.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    top1_agreement: float
    mean_kl: float
    loss_trained: float
    loss_exported: float
    loss_difference: float
    original: FromOriginal | None


@dataclass(frozen=True)
class Facts:
    """What the card tells.

    Attributes:
        base: Source of the base, a path or a hub id.
        fingerprint: The base's fingerprint.
        kind: ``dense``, ``nf4`` or ``gguf``.
        budget: What was asked for, None when rank and density were.
        trainable: Trained parameters.
        parameters: The base's parameters.
        ranks: Smallest and largest rank.
        nnz: Sparse values.
        dtype: That of the written weights.
        merged_into: ``nf4``, ``original``, or empty for an adapter that was not merged.
        form: ``safetensors`` or ``gguf``, of what was merged.
        made_of: The 16-bit model that ``qrosa quantize`` made the base of, a path or a hub id; None for other bases.
    """

    base: str
    fingerprint: str
    kind: str
    budget: str | None
    trainable: int
    parameters: int
    ranks: tuple[int, int]
    nnz: int
    dtype: str
    merged_into: str
    form: str = "safetensors"
    made_of: str | None = None

    @property
    def bare(self) -> bool:
        """The base without an adapter."""
        return not self.trainable and bool(self.merged_into)


def write_card(folder: Path, facts: Facts, drift: Drift | None = None) -> None:
    """Write the folder's README.md.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_text(folder / CARD_FILE, render_card(facts, drift))


def render_card(facts: Facts, drift: Drift | None = None) -> str:
    """The card's Markdown, with the metadata header that model hubs read."""
    local = Path(facts.base).is_absolute()
    name = Path(facts.base).name if local else facts.base
    header = [] if local else [f"base_model: {name}"]
    library = "peft" if not facts.merged_into else "gguf" if facts.form == "gguf" else "transformers"
    rows = [
        ("Base", f"{name}, {_kind(facts)}"),
        ("Base fingerprint", f"`{facts.fingerprint[:16]}`"),
    ]
    if not facts.bare:
        rows += [
            ("Trained parameters", _trained(facts)),
            ("Low-rank part", _ranks(facts.ranks)),
            ("Sparse part", f"{facts.nnz:,} values" if facts.nnz else "none"),
        ]
    rows.append(("Weights", facts.dtype))
    if facts.merged_into and not facts.bare:
        rows.append(("Merged into", _MERGED_INTO[facts.merged_into]))
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [qrosa]", *header, "---", ""]
    title = f"{name}, decoded from its 4-bit form" if facts.bare else f"{name}, fine-tuned with qrosa"
    lines += [f"# {title}", "", _usage(facts), "", "## How it was made", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    if drift is not None:
        lines += ["## Drift", "", *_drift_lines(drift), ""]
    lines += ["The licence of the base model applies.", ""]
    return "\n".join(lines)


def _kind(facts: Facts) -> str:
    if facts.made_of is None:
        return _KINDS.get(facts.kind, facts.kind)
    name = Path(facts.made_of).name if Path(facts.made_of).is_absolute() else facts.made_of
    return f"made by `qrosa quantize` of {name}: NF4 with double quantisation, rounded with error feedback"


def _usage(facts: Facts) -> str:
    if facts.form == "gguf":
        return (
            "A base model with a low-rank and a sparse adapter merged in, tokenizer and chat template in the file: "
            "`llama-cli -m model.gguf`, or `ollama create NAME -f Modelfile`."
        )
    if facts.bare:
        return (
            "A base model with the values that its 4-bit form has, for adapters that were trained on that form: "
            "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)`."
        )
    if facts.merged_into:
        return (
            "A base model with a low-rank and a sparse adapter merged in. It loads like any other model, "
            "without qrosa: `AutoModelForCausalLM.from_pretrained(folder)`."
        )
    if facts.nnz:
        return (
            "A low-rank and a sparse adapter in PEFT's Super-Tuning format: `PeftModel.from_pretrained(base, folder)`. "
            "The base is the one that was trained on, decoded, as `qrosa export RUN --output BASE --base-only` writes "
            "it. On the base's original weights the adapter gives a worse model."
        )
    return "A low-rank adapter in PEFT's format: `PeftModel.from_pretrained(base, folder)`."


def _trained(facts: Facts) -> str:
    share = f", {100 * facts.trainable / facts.parameters:.3g}% of the base's" if facts.parameters else ""
    asked = f" (budget {facts.budget})" if facts.budget else ""
    return f"{facts.trainable:,}{share}{asked}"


def _ranks(ranks: tuple[int, int]) -> str:
    if not ranks[1]:
        return "none"
    return f"rank {ranks[1]}" if ranks[0] == ranks[1] else f"ranks {ranks[0]} to {ranks[1]}"


def _drift_lines(drift: Drift) -> list[str]:
    lines = [
        f"Measured between the trained model and these weights on {drift['rows']} rows, {drift['tokens']:,} tokens:",
        "",
        "| | |",
        "|---|---|",
        f"| Same most likely token | {100 * drift['top1_agreement']:.2f}% |",
        f"| Mean KL divergence, trained from exported | {drift['mean_kl']:.3g} nats |",
        f"| Loss, trained | {drift['loss_trained']:.4f} |",
        f"| Loss, exported | {drift['loss_exported']:.4f} ({drift['loss_difference']:+.4f}) |",
    ]
    original = drift["original"]
    if original is not None:
        lines += [
            f"| Loss, 16-bit model before training | {original['loss']:.4f} |",
            f"| Mean KL divergence, 16-bit model from exported | {original['mean_kl']:.3g} nats |",
            f"| Same most likely token as the 16-bit model | {100 * original['top1_agreement']:.2f}% |",
        ]
    return lines
