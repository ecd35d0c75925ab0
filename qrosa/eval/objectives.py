"""What is learnt: one entry an objective, and everything that depends on which one it is.

The loss of an objective that compares answers is a function of few numbers: each answer's log-probability under the
model and under its base. So an objective is that function, in fp64 on the host; its slope in each answer's
log-probability, which is all that training needs beside it, is autograd's. The settings' choices and help, the data's
kinds of rows, the plan's passes, training and evaluation read this table; to add an objective, write its loss and add
its entry. The file imports nothing of qrosa, and torch only where tensors are at hand.

Sources: direct preference optimisation (DPO), arXiv 2305.18290; odds ratio preference optimisation (ORPO), arXiv
2403.07691; Kahneman-Tversky optimisation (KTO), arXiv 2402.01306.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Answers = Literal["single", "pairs", "judged"]
"""How answers stand in the data: each to be learnt, in pairs of a chosen and a rejected one, or each with a label that
says whether it is wanted."""

_LEAST = 1e-9  # nats that an answer's mean log-probability lies below 0 in its odds, which have no end there


@dataclass(frozen=True)
class Scores:
    """What is known of rows before they are compared; tensors [n] on the CPU, pairs as chosen and rejected in turn.

    Attributes:
        policy: fp64, log-probability of each row's answer, summed over its tokens.
        reference: The same of the base without the adapter; zeros where the objective does not read it.
        tokens: fp64, tokens of each answer.
        wanted: bool, false for answers to be unlearnt.
        drift: Mean of policy - reference over answers to other rows' prompts, not below 0.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    wanted: Tensor
    drift: float = 0.0

    @property
    def gained(self) -> Tensor:
        """How much likelier than the base the model makes each answer, in nats."""
        return self.policy - self.reference


class Weights(Protocol):
    """The settings that a loss reads."""

    @property
    def beta(self) -> float:
        """Factor on margins, or on the part of the loss that has them."""

    @property
    def desirable_weight(self) -> float:
        """What a wanted answer counts."""

    @property
    def undesirable_weight(self) -> float:
        """What an unwanted answer counts."""


Loss = Callable[[Scores, Weights], "tuple[Tensor, Tensor]"]
"""Losses and margins, [m] each: of rows, or of pairs of them. A margin above 0 means that the preference is held."""


@dataclass(frozen=True)
class Objective:
    """One thing to learn.

    Attributes:
        name: As ``--objective`` takes it.
        words: What it is, for the flag's help.
        answers: How answers stand in the data.
        loss: What compares answers; None where each is learnt by its own cross-entropy.
        reference: The base without the adapter scores the rows as well.
        mismatched: So are the rows' prompts with other rows' answers.
    """

    name: str
    words: str
    answers: Answers = "single"
    loss: Loss | None = None
    reference: bool = False
    mismatched: bool = False

    @property
    def compares(self) -> bool:
        """Rows are scored before they are trained on."""
        return self.loss is not None

    @property
    def group(self) -> int:
        """Rows that belong together, one behind the other."""
        return 2 if self.answers == "pairs" else 1

    @property
    def passes(self) -> int:
        """Forward passes that score as many tokens as a step has."""
        return (1 + self.reference) * (1 + self.mismatched) if self.compares else 0


def _dpo(scores: Scores, weights: Weights) -> tuple[Tensor, Tensor]:
    """-log sigmoid(beta * margin), the margin being what the chosen answer gained over the rejected one."""
    from torch.nn.functional import softplus

    chosen, rejected = scores.gained.view(-1, 2).unbind(1)
    margin = chosen - rejected
    return softplus(-weights.beta * margin), margin


def _orpo(scores: Scores, weights: Weights) -> tuple[Tensor, Tensor]:
    """The chosen answer's mean cross-entropy, and beta * -log sigmoid(margin), the margin being the log odds ratio.

    An answer's odds are p / (1 - p), with log p the mean over its tokens.
    """
    import torch
    from torch.nn.functional import softplus

    mean = scores.policy / scores.tokens
    below = mean.clamp(max=-_LEAST)
    odds = below - torch.log(-torch.expm1(below))
    margin = odds[0::2] - odds[1::2]
    return weights.beta * softplus(-margin) - mean[0::2], margin


def _kto(scores: Scores, weights: Weights) -> tuple[Tensor, Tensor]:
    """weight * (1 - sigmoid(beta * margin)), the margin being what a wanted answer gained over the drift of others, or
    the drift over what an unwanted one gained."""
    wanted = scores.wanted.double()
    weight = weights.desirable_weight * wanted + weights.undesirable_weight * (1 - wanted)
    margin = (2 * wanted - 1) * (scores.gained - scores.drift)
    return weight * (-weights.beta * margin).sigmoid(), margin


_TABLE = (
    Objective("sft", "the answers of the rows"),
    Objective(
        "dpo",
        "which of two answers is preferred, against the base without the adapter, from rows of prompt, chosen and "
        "rejected",
        answers="pairs",
        loss=_dpo,
        reference=True,
    ),
    Objective("orpo", "the chosen answer and that it is preferred, from such rows", answers="pairs", loss=_orpo),
    Objective(
        "kto",
        "which answers are wanted, against the base, from rows of prompt, completion and label",
        answers="judged",
        loss=_kto,
        reference=True,
        mismatched=True,
    ),
)

OBJECTIVES = {objective.name: objective for objective in _TABLE}


def describe_objectives() -> str:
    """The objectives in words: ``the answers of the rows (sft), ...``."""
    *most, last = (f"{objective.words} ({objective.name})" for objective in _TABLE)
    return f"{'; '.join(most)}; or {last}"
