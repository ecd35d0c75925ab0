"""What an error in a layer's output costs, token by token: the squared gradient there.

A layer-wise second moment counts every token of the calibration alike. The loss does not: an output error e of a token
costs (g^T e)^2 / 2 to second order, g the gradient of the log-likelihood of what the model itself would say (the Fisher
information, so no labels are needed: tokens are drawn from the model). With each token weighed by the mean of g's
squares, H = sum_t ||g_t||^2 x_t x_t^T, rounding spends its freedom where the loss sees it. Published for groups of
output channels as GuidedQuant (arXiv 2505.07004); here all channels of all matrices that share an input are one group,
so that they keep sharing a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.masks.observe import observe
from qrosa.masks.selection_rows import quiet
from qrosa.model.head import CHUNK_TOKENS, decoder_output, head_logits, model_device
from qrosa.planner.bytes.calibration import IMPORTANCE_ROWS


def token_importance(
    model: nn.Module, ids: Tensor, seed: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Weights of calibration tokens for each quantised layer's input.

    Args:
        model: A loaded base.
        ids: Windows int64 [B, L].
        seed: Of the tokens that the model is asked for.
        progress: Called with windows done and in all.

    Returns:
        Path -> fp32 [B, L] on the CPU, mean 1; the same for layers that share an input.
    """
    layers = quantized_linears(model)
    leaders = shared_inputs(model, layers, ids[:1])
    found = {path: torch.zeros(ids.shape) for path in dict.fromkeys(leaders.values())}
    rows = slice(0, 0)

    def receive(path: str, dy: Tensor, _: Tensor) -> None:
        squares = dy.float().square().sum(1).view(-1, ids.shape[1])
        found[leaders[path]][rows] += squares.cpu()

    receivers = {path: lambda dy, x, path=path: receive(path, dy, x) for path in leaders}
    watched = {path: layers[path] for path in leaders}
    with quiet(model), observe(watched, receivers) as anchor, torch.random.fork_rng(_devices(model)):
        torch.manual_seed(seed)
        for start in range(0, len(ids), IMPORTANCE_ROWS):
            rows = slice(start, start + IMPORTANCE_ROWS)
            with torch.enable_grad():
                here = ids[rows].to(model_device(model))
                output = decoder_output(model, here, torch.ones_like(here), use_cache=False)
                hidden = output.last_hidden_state.flatten(0, 1)
                above = torch.cat([_gradient(model, part) for part in hidden.split(CHUNK_TOKENS)])
                torch.autograd.grad(hidden, anchor, above, allow_unused=True)
            if progress:
                progress(min(start + IMPORTANCE_ROWS, len(ids)), len(ids))
    return {path: _normal(found[leader]) for path, leader in leaders.items()}


def shared_inputs(model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor) -> dict[str, str]:
    """Layer -> the first layer that reads the same input, told by a forward pass; layers that never run are missing."""
    leaders: dict[str, str] = {}
    first: dict[str, Tensor] = {}  # kept alive, so that no later tensor can take a first one's place

    def hook(path: str, x: Tensor) -> None:
        same = (other for other, known in first.items() if known is x)
        leaders[path] = next(same, path)
        first.setdefault(leaders[path], x)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: hook(path, inputs[0]))
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            here = ids.to(model_device(model))
            decoder_output(model, here, torch.ones_like(here), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return leaders


def _gradient(model: nn.Module, hidden: Tensor) -> Tensor:
    """Of minus the log-likelihood of a token drawn from the model's own distribution at each of [n, d] positions."""
    leaf = hidden.detach().requires_grad_()
    logits = head_logits(model, leaf)
    drawn = torch.multinomial(logits.detach().softmax(1), 1)
    lost = logits.logsumexp(1) - logits.gather(1, drawn)[:, 0]
    return torch.autograd.grad(lost.sum(), leaf)[0]


def _normal(weights: Tensor) -> Tensor:
    """Mean 1; all 1 where no gradient came."""
    mean = weights.mean()
    return weights / mean if bool(mean.isfinite()) and bool(mean > 0) else torch.ones_like(weights)


def _devices(model: nn.Module) -> list[torch.device]:
    device = model_device(model)
    return [device] if device.type == "cuda" else []
