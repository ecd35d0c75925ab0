"""Text from a model: one prompt, or a chat with history, as it is made.

transformers does the decoding; this module decides what goes in and when it stops. A prompt goes through the
tokenizer's chat template when there is one, because a chat model answers a bare prompt badly, unless it is asked
not to. Generation ends at any of the end tokens that the model, its generation config or the tokenizer name:
checkpoints often disagree on them, and missing one means an answer that never stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrosa.data.encode import Encoder, encode_prompt
from qrosa.errors import InputError
from qrosa.model.head import generating, model_device

Message = dict[str, Any]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token each time; 1 samples from the model's distribution.
        top_p: Sample among the most likely tokens that together have this probability.
        seed: Source of the samples; None draws a new one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} is not above zero", "use a count such as 256")
        if not 0 <= self.temperature <= 10:
            raise InputError(
                f"--temperature {self.temperature:g} is out of range",
                "use 0 (the most likely token) up to 10; 0.7 is usual",
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p:g} is out of range", "use a share above 0 and up to 1, such as 0.9")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is out of range", "use a seed from 0 up to 2^63")


@dataclass(frozen=True)
class Answer:
    """What was generated.

    Attributes:
        text: Without special tokens.
        tokens: Number of new tokens, the end token included.
        prompt_tokens: Number of tokens that the model was given.
        finished: Whether the model ended by itself, and not at the limit or by an interrupt.
        interrupted: Whether Ctrl-C stopped it.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool
    interrupted: bool


class Chat:
    """A conversation: each `say` sees everything said before.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer, with a chat template.
        sampling: How tokens are picked.
        system: The system message, if any.

    Raises:
        InputError: The tokenizer has no chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sampling: Sampling, system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template", "use --prompt, which goes on from a text")
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.system = system
        self.history: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.history = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, on_text: OnText | None = None) -> Answer:
        """Add a user's turn and the model's answer to the history.

        Args:
            text: What the user says.
            on_text: Called with each piece of the answer as it is made.

        Raises:
            InputError: The conversation has grown past the model's context; the history stays as it was.
        """
        turn = [*self.history, {"role": "user", "content": text}]
        input_ids = encode_messages(self.tokenizer, turn)
        answer = generate_ids(self.model, self.tokenizer, input_ids, self.sampling, on_text)
        self.history = [*turn, {"role": "assistant", "content": answer.text}]
        return answer


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    system: str | None = None,
    raw: bool = False,
    on_text: OnText | None = None,
) -> Answer:
    """Answer one prompt.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        prompt: The user's message, or the text to go on from when `raw` or when there is no chat template.
        sampling: How tokens are picked.
        system: A system message; needs a chat template.
        raw: Use no chat template.
        on_text: Called with each piece of text as it is made.

    Raises:
        InputError: An empty prompt, one longer than the model's context, or a system message without a template.
    """
    templated = bool(tokenizer.chat_template) and not raw
    if system and not templated:
        raise InputError(
            "a system message needs a chat template", "leave out --system" if raw else "put it into the prompt itself"
        )
    if templated:
        messages = [{"role": "system", "content": system}] if system else []
        input_ids = encode_messages(tokenizer, [*messages, {"role": "user", "content": prompt}])
    else:
        input_ids = list(tokenizer(prompt)["input_ids"])
    return generate_ids(model, tokenizer, input_ids, sampling, on_text)


def encode_messages(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation, up to where the assistant speaks next, exactly as training rows have them.

    Raises:
        InputError: No chat template, or one that refuses the messages, such as a system message.
    """
    return encode_prompt(list(messages), tokenizer)


def generate_ids(
    model: nn.Module, tokenizer: Any, input_ids: Sequence[int], sampling: Sampling, on_text: OnText | None = None
) -> Answer:
    """Generate after `input_ids`. Ctrl-C ends the answer and keeps what there is.

    Raises:
        InputError: Nothing to start from, or more than the model's context.
    """
    if not input_ids:
        raise InputError("the prompt is empty", "give some text with --prompt")
    room = _context(model) - len(input_ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(input_ids)} tokens, the model takes {_context(model)}",
            "shorten it, or /reset a chat",
        )
    _check_ids(model, tokenizer, input_ids)
    ids = torch.tensor([list(input_ids)], device=model_device(model))
    made = _Collector(tokenizer, on_text)
    interrupted = False
    config = _generation_config(model, tokenizer, sampling, room)
    torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
    try:
        continue_ids(model, ids, config, made)
    except KeyboardInterrupt:
        interrupted = True
        made.end()
    finished = bool(made.tokens) and made.tokens[-1] in end_tokens(model, tokenizer)
    text = _decode(tokenizer, made.tokens).strip()
    return Answer(text, len(made.tokens), len(input_ids), finished and not interrupted, interrupted)


def continue_ids(model: nn.Module, ids: Tensor, config: Any, streamer: Any = None) -> Tensor:
    """transformers' generation as the engine runs it: no gradients, no dropout, the attention that is quick here.

    Args:
        model: A transformers causal language model.
        ids: int64 [B, L], no padding.
        config: A transformers ``GenerationConfig``.
        streamer: Gets the prompt, then each token.

    Returns:
        int64 [B, L + new].
    """
    with generating(model):
        found = cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
        )
    return cast(Tensor, found)


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token at which generation ends: those of the configs, of the tokenizer and of its chat template.

    A loaded adapter has put the tokens that it has learnt to end with into the model's generation config.
    """
    hf = cast(Any, model)
    named = [getattr(hf.generation_config, "eos_token_id", None), getattr(hf.config, "eos_token_id", None)]
    named.append(tokenizer.eos_token_id)
    found: set[int] = set()
    for value in named:
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    if tokenizer.chat_template:
        found.update(Encoder(tokenizer, seq_len=1).end_ids)
    return found


def padding_token(model: nn.Module, tokenizer: Any) -> int:
    """A token to pad with; it is always masked, so any will do when none is named."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(end_tokens(model, tokenizer), default=0)


def _generation_config(model: nn.Module, tokenizer: Any, sampling: Sampling, room: int) -> Any:
    """What was asked for and nothing else: a checkpoint's own sampling defaults do not apply."""
    from transformers import GenerationConfig

    sampled: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=padding_token(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        **sampled,
    )


def _check_ids(model: nn.Module, tokenizer: Any, input_ids: Sequence[int]) -> None:
    size = cast(Any, model).get_input_embeddings().weight.shape[0]
    if max(input_ids) >= size:
        token = tokenizer.convert_ids_to_tokens(max(input_ids))
        raise InputError(
            f"token {token!r} of the prompt has id {max(input_ids)}, and the model knows {size} tokens",
            "use the tokenizer that came with the model",
        )


def _context(model: nn.Module) -> int:
    config = cast(Any, model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text without special tokens; spaces stay as they are, so that more tokens never change what is there."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Collector:
    """A transformers streamer that keeps the new tokens and passes on the text that can no longer change.

    Text is decoded from all tokens so far, since a token may be part of a character or change the spaces before it; a
    piece is passed on once it does not end in an unfinished character.
    """

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.tokens: list[int] = []
        self._prompt_seen = False
        self._shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call), then each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens.extend(value.flatten().tolist())
        self._show(final=False)

    def end(self) -> None:
        """Pass on what was held back."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        if self.on_text is None:
            return
        text = _decode(self.tokenizer, self.tokens)
        if text.endswith("\ufffd") and not final:
            return
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self.on_text(text[len(self._shown) :])
            self._shown = text
