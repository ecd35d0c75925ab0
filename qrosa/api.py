"""What Python programs call: a base with adapters on it, its optimizer, a plan, and a run from start to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qrosa.base.adapter_io import attach_adapter, refuse_unmeasured
from qrosa.base.load import load_base
from qrosa.config import AdapterConfig, RunConfig, make_run_config, read_yaml, to_flat
from qrosa.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qrosa.optim.torch_optimizer import TorchAdapterOptimizer
    from qrosa.planner.plan import Plan
    from qrosa.train.callbacks import Callback

Settings = RunConfig | Mapping[str, Any] | str | Path
"""A run's settings: as they are, as a flat mapping of what the flags are called, or as the path of a YAML file."""


def load(
    source: str | Path,
    adapter: AdapterConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 42,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base in 4 bits and, if asked, put trainable adapters on it.

    Args:
        source: A model folder, a ``.gguf`` file or a Hugging Face id.
        adapter: The budget and its split; None loads the bare base.
        device: Where the model goes.
        seed: Source of the low-rank part's initial values.

    Returns:
        A transformers model and its tokenizer. The low-rank part is trainable at once;
        ``qrosa.select_masks(model, batches)`` adds the sparse part.

    Raises:
        InputError: A model that cannot be a base, a budget that cannot be met, or ranks by sensitivity, which only
            ``qrosa finetune`` has the rows to measure.
        StorageError: Damaged or unreadable files.
    """
    if adapter is not None:
        refuse_unmeasured(adapter)  # before the weights are read
    model, tokenizer = load_base(str(source), device)
    if adapter is not None:
        attach_adapter(model, adapter, seed)
        model.train()
    return model, tokenizer


def optimizer(
    model: nn.Module,
    *,
    lr: float | None = None,
    sparse_lr: float | None = None,
    steps: int | None = None,
    weight_decay: float = 0.0,
    kind: str = "adamw",
) -> TorchAdapterOptimizer:
    """The optimizer that the command line uses, as a ``torch.optim.Optimizer``: fp32 masters, two learning rates.

    Args:
        model: A model from ``load``, on the device where it will be trained. A sparse part that comes later is taken
            in by itself.
        lr: Learning rate of the low-rank part (``param_groups[0]``); None for one by rule, as the command line has it.
        sparse_lr: Learning rate of the sparse part (``param_groups[1]``); None likewise.
        steps: Optimizer steps of the whole run, which rates by rule depend on; None counts as 256.
        weight_decay: Decoupled weight decay.
        kind: ``adamw``, ``adamw8bit`` or ``paged-adamw8bit``.

    Raises:
        InputError: The model has no adapter or a frozen one, or the kind is unknown.
    """
    from qrosa.adapters.inject import quantized_linears
    from qrosa.optim.rates import ALPHA, choose_rates
    from qrosa.optim.torch_optimizer import TorchAdapterOptimizer

    alphas = [layer.alpha for layer in quantized_linears(model).values() if layer.rank]
    width = cast(Any, model).config.get_text_config().hidden_size
    rates = choose_rates(width=width, alpha=max(alphas, default=ALPHA), steps=steps, low_rank=lr, sparse=sparse_lr)
    return TorchAdapterOptimizer(model, lr=rates.low_rank, sparse_lr=rates.sparse, weight_decay=weight_decay, kind=kind)


def finetune(
    config: Settings, *, resume: bool = False, force: bool = False, callbacks: Iterable[Callback] = ()
) -> dict[str, Any]:
    """A fine-tuning run in one call: what ``qrosa finetune`` does.

    Args:
        config: The settings.
        resume: Go on with the run that lies in the output folder.
        force: Start over in a folder that holds a run.
        callbacks: Told of each step, evaluation and checkpoint (``qrosa.Callback``).

    Returns:
        The contents of ``report.json``.

    Raises:
        QrosaError: Whatever ``qrosa finetune`` would end with; ``exit_code`` says which.
    """
    from qrosa.train.run import finetune as run

    settings = config if isinstance(config, RunConfig) else make_run_config(_flat(config))
    return run(settings, resume=resume, force=force, callbacks=callbacks)


def plan(config: Settings | None = None, **settings: Any) -> Plan:
    """What a run will take, phase by phase, before anything is loaded: what ``qrosa plan`` tells.

    Args:
        config: Settings to begin with, as for ``finetune``.
        settings: Single settings on top: ``plan(model="path/or/id", budget="0.3%", vram="24GB")``.

    Returns:
        The plan: ``fits``, ``peak``, ``settings``, ``phases``; ``qrosa.planner.show.document`` makes the JSON of it.

    Raises:
        InputError: A model, a budget or a setting that cannot be.
    """
    from qrosa.cli.plan import make_plan

    values = {**({} if config is None else _flat(config)), **settings}
    if not values.get("model"):
        raise InputError("no model is named", "give model=, a folder or a Hugging Face id")
    return make_plan(str(values["model"]), values)


def _flat(config: Settings) -> dict[str, Any]:
    """Settings as one flat mapping."""
    if isinstance(config, RunConfig):
        return {name: value for name, value in to_flat(config).items() if value is not None}
    return dict(config) if isinstance(config, Mapping) else read_yaml(config)
