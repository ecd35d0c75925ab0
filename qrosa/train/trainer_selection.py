"""Mask selection in the middle of a trainer's run, by one process or by several.

Every process holds the whole model and reads the same rows, so each selects for itself and takes the main process's
answer. What the processes' wrapper (DDP) cannot know is the sparse part, which comes after it was made: its gradients
are averaged here, once they are all there, in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import adapter_parameters, quantized_linears
from qrosa.adapters.linear import SPARSE_TENSORS
from qrosa.config import MaskConfig
from qrosa.masks.apply import select_masks
from qrosa.model.head import CHUNK_TOKENS
from qrosa.train.agree import agree
from qrosa.train.selection import sample_loss
from qrosa.train.trainer_rows import Answer, answers_itself, dataloader_rows

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainingArguments


def keep_positions_home(model: nn.Module) -> None:
    """Keep DDP from sending around where sparse values are: the same in every process, and of dtypes it cannot send."""
    names = [
        f"{path}.{name}" for path in quantized_linears(model) for name in SPARSE_TENSORS if name != "sparse_values"
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def trainer_rows(
    model: nn.Module, args: TrainingArguments, dataloader: DataLoader[Any], tokenizer: Any, count: int, seed: int
) -> Iterator[Mapping[str, Any]]:
    """Rows of the trainer's own data; prompts without answers are answered by the model as it is.

    Raises:
        InputError: The trainer's batches hold nothing that masks could be selected on.
    """
    answer: Answer | None = None
    longest = getattr(args, "max_completion_length", None)
    if longest is not None and tokenizer is not None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        answer = answers_itself(model, tokenizer, temperature=args.temperature, longest=longest, seed=seed)  # type: ignore[attr-defined]
    return dataloader_rows(dataloader, count, seed, answer)


def pick_masks(
    model: PreTrainedModel, args: TrainingArguments, rows: Iterator[Mapping[str, Any]], config: MaskConfig, seed: int
) -> None:
    """Give ``model`` its sparse part, the same one in every process, and have its gradients averaged over them."""
    processes = args.distributed_state

    def agreed(positions: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(positions, agree(processes, list(positions.values())), strict=True))

    select_masks(model, rows, config=config, seed=seed, loss=sample_loss(CHUNK_TOKENS), agreed=agreed)
    if processes is not None and processes.num_processes > 1:
        sparse = adapter_parameters(model).sparse
        with torch.no_grad():
            for parameter, value in zip(sparse, agree(processes, sparse), strict=True):
                parameter.copy_(value)
        GradientMean(sparse)


class GradientMean:
    """Averages the gradients of parameters over all processes when a step's last micro-batch has gone backward.

    Args:
        parameters: Each takes part in every backward pass; hooks on them keep this object alive.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._seen = 0
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        self._seen += 1
        if self._seen < len(self.parameters):
            return
        self._seen = 0
        from accelerate.state import GradientState

        if GradientState().sync_gradients:
            self._average()

    def _average(self) -> None:
        from accelerate.utils import reduce

        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
