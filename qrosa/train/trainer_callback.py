"""The phases of a run inside transformers' ``Trainer``, and trainers that derive from it, such as TRL's.

    model, tokenizer = qrosa.load("path/or/id", qrosa.AdapterConfig(budget="0.3%"))
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[qrosa.RosaCallback()],
                      optimizers=(qrosa.optimizer(model, steps=200), None))

The trainer keeps its loop, its schedule and its checkpoints. The callback picks the masks after warm-up, on rows of the
trainer's own data set, and holds the sparse rate down over as many steps as the schedule's own warm-up has. The
trainer's schedule turns both rates, whose heights are the optimizer's: ``args.learning_rate`` has no say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from qrosa.adapters.inject import adapter_parameters, quantized_linears, ramp_low_rank, trainable_parameters
from qrosa.base.adapter_io import adapter_alpha
from qrosa.base.load import base_info
from qrosa.config import MaskConfig
from qrosa.errors import InputError
from qrosa.masks.scores import MASK_SCORES
from qrosa.optim.parts import SPARSE
from qrosa.optim.schedule import Phases, phases_of, sparse_rise
from qrosa.optim.torch_optimizer import TorchAdapterOptimizer, check_not_frozen
from qrosa.train.trainer_checkpoint import leave_base_out, make_resumable
from qrosa.train.trainer_reference import check_reference, check_reference_used
from qrosa.train.trainer_selection import keep_positions_home, pick_masks, trainer_rows

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

_OPTIMIZER_HINT = "give the trainer optimizers=(qrosa.optimizer(model, lr=..., sparse_lr=...), None)"


class RosaCallback(TrainerCallback, ExportableState):
    """Drives warm-up, mask selection and joint training inside a trainer; give it as one of its ``callbacks``.

    Args:
        masks: How positions are scored, and after how many steps; default as ``qrosa finetune``. A mapping of the same
            settings does, too.
        seed: Of the rows that masks are selected on, and of the random score.

    Attributes:
        selected_at: Steps that were done when the masks were picked; None before.
        base: Fingerprint of the base that is trained on.
    """

    def __init__(self, masks: MaskConfig | Mapping[str, Any] | None = None, *, seed: int = 42) -> None:
        self.masks = masks if isinstance(masks, MaskConfig) else MaskConfig(**(masks or {}))
        self.seed = seed
        self.selected_at: int | None = None
        self.base: str | None = None
        self._phases = Phases(warmup=0, total=0, sparse=False)

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` keeps of the callback."""
        return {
            "args": {"masks": dataclasses.asdict(self.masks), "seed": self.seed},
            "attributes": {"selected_at": self.selected_at, "base": self.base},
        }

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        """Refuse what cannot be trained, and have the trainer save and load the adapter alone.

        TRL's trainers for preferences and rewards switch dropout off in modules of torch's class only; here it is done
        to the low-rank parts.

        Raises:
            InputError: No adapter, a frozen one, a way of spreading work that only ``qrosa finetune`` has, or a second
                model that would be loaded.
        """
        _check_adapter(model)
        _check_machines(args)
        assert model is not None
        check_reference(model, args)
        make_resumable(model)
        keep_positions_home(model)
        if getattr(args, "disable_dropout", False):
            for layer in quantized_linears(model).values():
                if layer.low_rank is not None:
                    layer.low_rank.dropout = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        train_dataloader: DataLoader[Any] | None = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Lay out the phases, and check once more, for much may happen to a model before it is trained.

        Raises:
            InputError: Nothing would train, the optimizer is not the adapter's, the checkpoint is of another base, or
                masks are still to be picked and the trainer's rows do not serve.
        """
        _check_adapter(model)
        assert model is not None
        make_resumable(model)
        own = _adapter_optimizer(optimizer, model)
        self._take_back(state, model)
        if state.global_step and not own.has_state:
            raise InputError(
                "the checkpoint has no optimizer state, whose fp32 masters a run goes on from",
                "save checkpoints without save_only_model; to start anew from an adapter, load it with load_adapter",
            )
        low_rank, sparse = adapter_parameters(model)
        planned = bool(sparse) or _wants_masks(model)
        self._phases = phases_of(state.max_steps, self.masks.warmup_steps, low_rank=bool(low_rank), sparse=planned)
        reads_rows = MASK_SCORES[self.masks.mask_score].reads_gradients
        if planned and not sparse and reads_rows and train_dataloader is not None:
            # What selection would stumble over after warm-up is refused before the first step.
            next(trainer_rows(model, args, train_dataloader, processing_class, 1, self.seed), None)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        train_dataloader: DataLoader[Any] | None = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Pick the masks once warm-up is over; let the scale rise of low-rank parts whose form wants that."""
        assert model is not None
        ramp_low_rank(model, adapter_alpha(model), state.global_step, state.max_steps)
        if self.selected_at is not None or self._phases.phase(state.global_step) == "warmup":
            return
        if not self._phases.sparse:
            return
        assert train_dataloader is not None
        rows = trainer_rows(model, args, train_dataloader, processing_class, self.masks.mask_samples, self.seed)
        pick_masks(model, args, rows, self.masks, self.seed)
        leave_base_out(model)
        self.selected_at = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Scale the sparse rate for the step at hand."""
        ramp = args.get_warmup_steps(state.max_steps)
        for group in optimizer.param_groups:
            if group["name"] == SPARSE:
                group["scale"] = sparse_rise(state.global_step, ramp, self.selected_at or 0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        """See that a reference model is the one that was made for this.

        Raises:
            InputError: It is not.
        """
        assert model is not None
        check_reference_used(model, args)

    def _take_back(self, state: TrainerState, model: nn.Module) -> None:
        """Go on where a checkpoint left off; a model that comes with masks had them from the start.

        Raises:
            InputError: The checkpoint is of another base.
        """
        self.base = base_info(model).fingerprint
        self.selected_at = 0 if _has_masks(model) else None
        callbacks: Any = state.stateful_callbacks  # name -> state; the type that transformers gives is a constructor's
        saved = callbacks.get(type(self).__name__) if state.global_step else None
        if saved is None:
            return
        attributes = saved["attributes"]
        if attributes["base"] != self.base:
            raise InputError(
                f"the checkpoint was trained on another base (fingerprint {str(attributes['base'])[:12]}; this one is "
                f"{self.base[:12]})",
                "resume with the base that the checkpoint was trained on",
            )
        self.selected_at = attributes["selected_at"]


def _has_masks(model: nn.Module) -> bool:
    return any(layer.nnz for layer in quantized_linears(model).values())


def _wants_masks(model: nn.Module) -> bool:
    allocation = getattr(model, "qrosa_allocation", None)
    return allocation is not None and any(allocation.nnz.values())


def _check_adapter(model: nn.Module | None) -> None:
    """Refuse a model of which nothing would train.

    Raises:
        InputError: It has no adapter, or a frozen one.
    """
    if model is None or not trainable_parameters(model):
        raise InputError(
            "the trainer's model has no adapter: nothing would train",
            'load it with one: qrosa.load(source, qrosa.AdapterConfig(budget="0.3%"))',
        )
    check_not_frozen(trainable_parameters(model))


def _check_machines(args: TrainingArguments) -> None:
    """Refuse engines that take parameters apart, however they were asked for: by arguments, launcher or environment.

    Raises:
        InputError: DeepSpeed, FSDP or several cards in one process.
    """
    fsdp = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    asked = {"DeepSpeed": args.deepspeed_plugin, "FSDP": fsdp, "several cards in one process": args.n_gpu > 1}
    for name, wanted in asked.items():
        if wanted:
            raise InputError(
                f"a trainer with {name} cannot drive a qrosa model",
                "use qrosa finetune (--deepspeed, accelerate launch), or one card (CUDA_VISIBLE_DEVICES=0)",
            )


def _adapter_optimizer(optimizer: Any, model: nn.Module) -> TorchAdapterOptimizer:
    """The trainer's optimizer without its wrapper.

    Raises:
        InputError: It is not ``qrosa.optimizer``'s, or of other parameters than the model's.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, TorchAdapterOptimizer):
        raise InputError(
            f"the trainer optimizes with {type(inner).__name__}, which has no fp32 masters and no place for the sparse "
            "part",
            _OPTIMIZER_HINT,
        )
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if held - {id(parameter) for parameter in trainable_parameters(model)}:
        raise InputError("the trainer's optimizer is of another adapter than its model's", _OPTIMIZER_HINT)
    return inner
