"""The model cut at its head: hidden states from the decoder, then log-probabilities of a few tokens, in chunks.

The logits of all positions are by far the largest tensor of an evaluation (4096 tokens x 128k words are 2 GiB in
fp32), and nearly all of them are thrown away. So the decoder runs without the head, and the head runs only where
something is read, a chunk of positions at a time. No gradients here; training has its own loss for that.

Three config attributes bend the logits of some families and are honoured: ``final_logit_softcapping`` (Gemma-2),
``logit_scale`` (Cohere) and ``logits_scaling`` (Granite).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.heap import look
from qrosa.ops import products

CHUNK_TOKENS = 256
_LOGIT_BYTES = 8  # of a logit, beside the chunk's before: fp32, and its exponential or what it was rounded from


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside the block; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """``evaluating`` for one token after another: what a call costs besides its arithmetic counts here.

    Quantised layers are checked once, and must stay as they are inside the block. Inference mode saves the bookkeeping
    of autograd, whose part in a small op is large. Attention is fused where the model has that: training on a CPU
    prefers the eager kind, whose backward is the quicker one there, but with one query at a time it only costs copies
    of the keys and values. What the model had is put back afterwards.
    """
    hf = cast(Any, model)
    kind = getattr(hf.config, "_attn_implementation", None)
    turn = kind not in (None, "sdpa") and bool(getattr(hf, "_supports_sdpa", False))
    if turn:
        hf.set_attn_implementation("sdpa")
    try:
        with evaluating(model), torch.inference_mode(), ExitStack() as layers:
            for layer in quantized_linears(model).values():
                layers.enter_context(layer.fixed())
            yield
    finally:
        if turn:
            hf.set_attn_implementation(kind)


def decoder_output(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **extra: Any) -> Any:
    """Run the decoder alone.

    Args:
        model: A transformers causal language model.
        input_ids: int64 [B, L].
        attention_mask: [B, L], or [B, cached + L] with a cache.
        extra: Passed on, such as ``use_cache`` and ``past_key_values``.

    Returns:
        The decoder's output; ``last_hidden_state`` is [B, L, d].
    """
    return cast(Any, model).get_decoder()(input_ids=input_ids, attention_mask=attention_mask, **extra)


@dataclass(frozen=True)
class Head:
    """A model's head with the rule that bends its logits; it outlives the model without keeping it in memory.

    Attributes:
        layer: The output layer, weight [V, d].
        softcap: Logits become ``softcap * tanh(logits / softcap)``.
        scale: Factor on the logits, before the cap.
    """

    layer: nn.Module
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a transformers causal language model."""
        text = cast(Any, model).config.get_text_config()
        softcap = getattr(text, "final_logit_softcapping", None)
        factor, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
        scale = float(factor or 1.0) / float(divisor or 1.0)
        return cls(cast(Any, model).get_output_embeddings(), float(softcap) if softcap else None, scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] in fp32 of hidden states [n, d], as the model itself would give them.

        Where products are taken in fp32 for want of 16-bit ones, they are not rounded to 16 bits on the way.
        """
        weight = cast(Tensor, self.layer.weight)
        hidden = hidden.to(weight.device, weight.dtype)
        if products.widens(hidden) and not torch.is_grad_enabled():
            logits = products.linear(hidden, weight, cast("Tensor | None", self.layer.bias))
        else:
            logits = cast(Tensor, self.layer(hidden)).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [n, V] in fp32 of hidden states [n, d]."""
    return Head.of(model).logits(hidden)


def token_log_probs(model: nn.Module, hidden: Tensor, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Log-probability of one token at each position.

    Args:
        model: A transformers causal language model.
        hidden: [n, d], the decoder's output.
        targets: int64 [n], the token that follows each position.
        chunk_tokens: Most positions whose logits exist at once.

    Returns:
        fp32 [n].
    """
    head, parts = Head.of(model), []
    for start in range(0, hidden.shape[0], chunk_tokens):
        look(_LOGIT_BYTES * min(chunk_tokens, hidden.shape[0]) * cast(Tensor, head.layer.weight).shape[0])
        logits = head.logits(hidden[start : start + chunk_tokens])
        picked = logits.gather(1, targets[start : start + chunk_tokens, None]).squeeze(1)
        parts.append(picked - torch.logsumexp(logits, dim=-1))
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


def model_device(model: nn.Module) -> torch.device:
    """The device that takes the model's input."""
    return cast(torch.device, cast(Any, model).get_input_embeddings().weight.device)


def logit_rule(config: Any) -> tuple[float | None, float]:
    """A transformers config's ``(softcap, scale)`` of the logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return (float(softcap) if softcap else None), scale
