"""The reference model inside TRL's trainers.

TRL leaves a second model out for PEFT's models alone; for every other it loads the base again, in 16 bits, by name. Its
trainers for preferences take a reference model instead; those for rewards take none, but read theirs only while they
train, so it can be put in its place before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError
from qrosa.model.reference import known_reference, reference_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

_HINT = "give the trainer ref_model=qrosa.reference_model(model): the base with the adapter off, no second copy"


def check_reference(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse, before it is loaded, a second 16-bit model; and one that would follow the first.

    Raises:
        InputError: The trainer would load one, or copy the trained model's parameters into its reference.
    """
    if getattr(args, "sync_ref_model", False):
        raise InputError(
            "sync_ref_model copies parameters of the model that is trained, and the base has none that are",
            "leave sync_ref_model out: the reference is the base with the adapter off",
        )
    if _takes_reference(args) and known_reference(model) is None:
        raise InputError("the trainer would load a second, 16-bit model as its reference", _HINT)
    beta: Any = getattr(args, "beta", None)
    if beta and hasattr(args, "num_generations"):
        raise InputError(
            f"with beta={beta:g} the trainer would load a second, 16-bit model as its reference",
            "make it with beta=0.0, then call qrosa.set_reference(trainer, beta=...) before train()",
        )


def check_reference_used(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse to go on after a step that ``reference_model``'s answer had no part in.

    Raises:
        InputError: The trainer was not given it.
    """
    known = known_reference(model)
    if _takes_reference(args) and known is not None and not known.used:
        raise InputError("the trainer does not use the reference model that was made for it", _HINT)


def _takes_reference(args: TrainingArguments) -> bool:
    """Whether the trainer is one of those that have an argument ``ref_model`` (TRL's DPO, KTO)."""
    return hasattr(args, "precompute_ref_log_probs")


def set_reference(trainer: Any, beta: float) -> None:
    """Hold a trainer with rewards to its base: the KL divergence from it counts ``beta`` times.

    Args:
        trainer: TRL's ``GRPOTrainer`` or ``RLOOTrainer`` of a model from ``qrosa.load``, made with ``beta=0.0`` (which
            keeps it from loading a model) and not trained yet.
        beta: Weight of the divergence.

    Raises:
        InputError: The trainer has a reference model, or no place for one.
    """
    from trl.trainer.utils import add_fused_lm_head

    if not hasattr(trainer, "beta") or not hasattr(trainer.args, "num_generations") or trainer.ref_model is not None:
        raise InputError(
            f"{type(trainer).__name__} has no open place for a reference model",
            "call this for a GRPOTrainer or RLOOTrainer made with beta=0.0",
        )
    reference = reference_model(trainer.accelerator.unwrap_model(trainer.model))
    in_fp32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)
    add_fused_lm_head(reference, temperature=trainer.temperature, cast_lm_head_to_fp32=in_fp32)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.beta = trainer.args.beta = float(beta)
