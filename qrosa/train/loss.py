"""The loss of supervised tokens, without ever holding the logits of all tokens.

With a vocabulary of 128k, fp32 logits of 4096 tokens are 2 GiB, and their gradient as much again. Two facts
make them unnecessary: only supervised positions carry loss, and the head is frozen, so that the gradient
that leaves the head is a function of one chunk of tokens at a time. The forward pass below therefore takes
the decoder's hidden states at the supervised positions and, chunk by chunk, computes logits, loss and the
gradient of the hidden states at once; backward only scales what is already there. Peak: one chunk of logits
in the head's dtype, the same chunk in fp32, and one [S, d] gradient in the hidden states' dtype. The price
against recomputing the chunk in backward: none in memory that matters (S * d), and one head matmul less.

Models that bend their logits do so by three config attributes, all honoured here: ``final_logit_softcapping``
(Gemma-2), ``logit_scale`` (Cohere) and ``logits_scaling`` (Granite).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qrosa.data.encode import IGNORE
from qrosa.errors import InputError
from qrosa.heap import look
from qrosa.model.attention import rows_of
from qrosa.model.head import CHUNK_TOKENS, logit_rule
from qrosa.ops import products

_LOGIT_BYTES = 8  # of a logit in fp32 and what it comes from or goes to, bf16 or capped
_CACHED_ROWS = 8  # on the CPU: rows of logits that stay in the L2 cache through the passes of a softmax


class TokenBatch(Protocol):
    """What the loss needs of a micro-batch."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    supervised: Tensor
    lengths: list[int] | None
    position_ids: Tensor | None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradient of ``hidden`` is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_tokens: int,
        softcap: float | None,
        scale: float,
        token_weights: Tensor | None,
    ) -> Tensor:
        """The sum, an fp32 scalar; arguments as ``chunked_loss`` has them, supervised positions only."""
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            look(_LOGIT_BYTES * min(chunk_tokens, hidden.shape[0]) * weight.shape[0])
            weights = None if token_weights is None else token_weights[rows]
            loss, d_logits = _chunk(
                hidden[rows], labels[rows], weight, bias, softcap, scale, gradient is not None, weights
            )
            total += loss
            if gradient is not None and d_logits is not None:
                _to_hidden(d_logits, weight, gradient[rows])
            del d_logits  # or it would live on beside the next chunk's logits
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    need_gradient: bool,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss sum (fp32 scalar) and gradient of the raw logits (fp32 [c, V]) of one chunk of c tokens."""
    if products.widens(hidden):
        logits = products.linear(hidden, weight, bias)
    else:
        logits = nn.functional.linear(hidden, weight, bias).float()  # [c, V]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    step = _CACHED_ROWS if hidden.device.type == "cpu" else max(len(labels), 1)
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        weights = None if token_weights is None else token_weights[rows, None]
        loss += _to_gradient(logits[rows], labels[rows], softcap, scale, need_gradient, weights)
    return loss, logits if need_gradient else None


def _to_hidden(d_logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """The gradient of hidden states, into ``out`` [c, d], of that of their logits, fp32 [c, V]."""
    if products.widens(out):
        out.copy_(products.product(d_logits, weight))
    else:
        torch.mm(d_logits.to(weight.dtype), weight, out=out)


def _to_gradient(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    scale: float,
    need_gradient: bool,
    token_weights: Tensor | None,
) -> Tensor:
    """Loss sum of some rows of raw logits [c, V]; they become their own gradient, or are spoilt without need.

    Each row counts ``token_weights`` [c, 1] times.
    """
    raw = logits
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits = raw.div_(softcap).tanh_() * softcap
    # The softmax by hand and in place: torch.logsumexp would hold a second [c, V] for its exponentials.
    picked = logits.gather(1, labels[:, None])
    top = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    losses = total.log() + top - picked
    loss = (losses if token_weights is None else losses * token_weights).sum()
    if not need_gradient:
        return loss
    gradient = weights.div_(total)
    # scatter_ of distinct positions. Under determinism a card sorts them first, some 20 small kernels a chunk of 256
    # rows and well below 0.1% of a step; a comparison with every column instead would read the whole chunk once more.
    gradient.scatter_(1, labels[:, None], gradient.gather(1, labels[:, None]) - 1.0)
    if token_weights is not None:
        gradient.mul_(token_weights)
    if softcap is not None:
        raw.square_().neg_().add_(1.0).mul_(gradient)  # d tanh = 1 - tanh^2
    if scale != 1.0:
        raw.mul_(scale)
    return loss


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Linear,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
    scale: float = 1.0,
    token_weights: Tensor | None = None,
    supervised: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the supervised positions.

    Args:
        hidden: [T, d], the decoder's output; row t predicts ``labels[t]`` (already shifted).
        labels: int64 [T], -100 where no loss falls.
        head: The frozen output layer, weight [V, d].
        chunk_tokens: Most positions whose logits exist at once.
        softcap: Gemma-2's cap: logits become ``softcap * tanh(logits / softcap)``.
        scale: Factor on the logits, before the cap.
        token_weights: fp32 [T], what each position's loss counts; 1 where none are given.
        supervised: int64 [S], the positions whose label is not -100, where they are known; to look for them makes the
            host wait for ``labels``.

    Returns:
        fp32 scalar; differentiable in ``hidden`` (first order).

    Raises:
        InputError: The head would need a gradient, which this loss does not compute.
    """
    if head.weight.requires_grad:
        raise InputError("the output head is trainable", "freeze it: only adapters are trained")
    if supervised is None:
        supervised = (labels != IGNORE).nonzero().squeeze(1)
    if supervised.numel() < labels.numel():
        hidden, labels = hidden.index_select(0, supervised), labels.index_select(0, supervised)
        token_weights = None if token_weights is None else token_weights.index_select(0, supervised)
    weight = head.weight
    if hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)
    total = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, labels, weight, head.bias, chunk_tokens, softcap, scale, token_weights
    )
    return cast(Tensor, total)


def model_loss(
    model: nn.Module, batch: TokenBatch, chunk_tokens: int = CHUNK_TOKENS, row_weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Loss sum of a micro-batch, and the number of tokens that it sums over.

    Args:
        model: A transformers causal language model, its decoder and head on the batch's device.
        batch: int64 [B, L] ``input_ids``, ``attention_mask`` and (unshifted) ``labels``, and int64 [S] ``supervised``,
            the flat places whose next token carries loss. Packed rows need attention by row (``set_attention``).
        chunk_tokens: Most positions whose logits exist at once.
        row_weights: fp32 [B], what each row's losses count; 1 where none are given. Rows with weights are not packed.

    Returns:
        ``(fp32 scalar, count)``: the mean loss is their quotient.
    """
    hf = cast(Any, model)
    told: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.lengths is not None and batch.position_ids is not None:
        told = rows_of(batch.lengths, batch.position_ids)
    hidden = hf.get_decoder()(input_ids=batch.input_ids, use_cache=False, **told).last_hidden_state
    # Labels move one to the left, and the last position predicts nothing: cutting it off hidden would copy [T, d].
    labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
    softcap, scale = logit_rule(hf.config)
    token_weights = None if row_weights is None else row_weights[:, None].expand(labels.shape).reshape(-1)
    total = chunked_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        labels.reshape(-1),
        hf.get_output_embeddings(),
        chunk_tokens=chunk_tokens,
        softcap=softcap,
        scale=scale,
        token_weights=token_weights,
        supervised=batch.supervised,
    )
    return total, batch.supervised.numel()
