"""How a trained model is asked and how its answers end: what an adapter must carry beside its numbers.

A base model trained with a chat template has learnt a token that ends its turns, and nothing in the base's configs need
name it. The tokens that ended the learnt answers, and the template if it is not the base's own, stand in the adapter's
config; whoever loads the adapter, or merges it into a model, takes them from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.errors import StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "speech"


@dataclass(frozen=True)
class Speech:
    """What ends an answer, and what asks for one.

    Attributes:
        end_tokens: Ids of the tokens that ended learnt answers.
        chat_template: The template that was trained with, None where it is the base's own.
    """

    end_tokens: tuple[int, ...] = ()
    chat_template: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Speech:
        """What an adapter's config says; nothing, where it is from before it said anything.

        Raises:
            StorageError: What it says cannot be.
        """
        told = config.get(_KEY)
        if not isinstance(told, Mapping):
            return cls()
        tokens, template = told.get("end_tokens") or (), told.get("chat_template")
        if not isinstance(tokens, (list, tuple)) or not all(type(token) is int and token >= 0 for token in tokens):
            raise StorageError("the adapter's end tokens are not token ids", "copy the adapter folder again")
        if not isinstance(template, (str, type(None))):
            raise StorageError("the adapter's chat template is no text", "copy the adapter folder again")
        return cls(tuple(tokens), template or None)

    def to_config(self) -> dict[str, Any]:
        """The entry for an adapter's config."""
        return {_KEY: {"end_tokens": list(self.end_tokens), "chat_template": self.chat_template}}

    def put_on(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer, with the template that was trained with."""
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def end(self, model: PreTrainedModel) -> None:
        """Let the model's own ``generate`` stop at the learnt tokens too."""
        if self.end_tokens and model.generation_config is not None:
            known = model.generation_config.eos_token_id
            model.generation_config.eos_token_id = with_ends(known, self.end_tokens)


def with_ends(known: int | Iterable[int] | None, learnt: Iterable[int]) -> int | list[int] | None:
    """End tokens of a config and those that were learnt, in the form of a config: one, or a list.

    The config's own come first: what names a single end token goes on to name the same.
    """
    first = [] if known is None else [known] if isinstance(known, int) else list(known)
    tokens = list(dict.fromkeys([*first, *learnt]))
    return None if not tokens else tokens[0] if len(tokens) == 1 else tokens
