"""What the main process computed, on every process: cards may round differently, and a near tie would part them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


@torch.no_grad()
def agree(accelerator: Accelerator | PartialState, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The main process's tensors, on every process.

    Args:
        accelerator: The processes; with one, ``tensors`` come back as they are.
        tensors: One sequence a process, of equal length and dtypes. Shapes may differ: each has one dimension, or
            the same shape everywhere.

    Returns:
        Tensors of the main process's values, each on the device where this process's own one is.
    """
    if accelerator.num_processes == 1:
        return list(tensors)
    from accelerate.utils import broadcast

    counts = torch.tensor([tensor.numel() for tensor in tensors], device=accelerator.device)
    agreed = []
    for tensor, count in zip(tensors, broadcast(counts).tolist(), strict=True):
        # Not the tensor itself: a broadcast writes into what it is given.
        sent = tensor.detach().to(accelerator.device, copy=True)
        if not accelerator.is_main_process and sent.numel() != count:
            sent = torch.zeros(count, dtype=tensor.dtype, device=accelerator.device)
        agreed.append(broadcast(sent).to(tensor.device))
    return agreed


def agree_on_bytes(accelerator: Accelerator, data: bytes) -> bytes:
    """The main process's bytes, on every process; what the others give is not looked at."""
    if accelerator.num_processes == 1:
        return data
    # Never empty: a view of nothing has no storage to send from.
    mine = torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)
    return agree(accelerator, [mine])[0].numpy().tobytes()[:-1]
