"""What a user can ask for: frozen, typed settings, checked once, here.

The settings stand in five groups. Each field is at once a command-line flag (``sparse_lr`` is
``--sparse-lr``), a key of a YAML config (``sparse-lr`` or ``sparse_lr``, all keys on one flat level) and an
attribute in Python; its help text stands beside it in the field's metadata, so the three cannot drift
apart. ``None`` always means "choose for me"; what was chosen is written into the run's ``config.yaml``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qrosa.errors import InputError, StorageError
from qrosa.eval.objectives import OBJECTIVES, Objective, describe_objectives
from qrosa.fields import check_positive, check_range, coerce, quoted, setting, suggest
from qrosa.masks.scores import MASK_SCORES, describe_scores
from qrosa.optim.kinds import OPTIMIZERS, SHARED, describe_optimizers
from qrosa.quantities import parse_budget, parse_offload, parse_share, parse_size

MASK_SCOPES = ("matrix", "global")
MASK_SELECTIONS = ("stream", "exact")
SPARSE_INITS = ("residual", "zero")
LOW_RANK_INITS = ("lora", "svd")
RANK_ORDERS = ("order", "sensitivity")
BASE_ROUNDINGS = ("nearest", "feedback")
SCHEDULES = ("linear", "cosine", "constant")
SPLITS = ("validation", "test")
LOGGERS = (  # those that accelerate knows
    *("tensorboard", "wandb", "trackio", "mlflow", "comet_ml"),
    *("aim", "clearml", "dvclive", "swanlab"),
)


@dataclass(frozen=True)
class AdapterConfig:
    """How many parameters are trained, and how they are split between the low-rank and the sparse part.

    Either ``budget`` (with ``sparse_share``), or ``rank`` with ``density`` or ``sparse_per_layer``.
    """

    budget: str | None = setting(
        None,
        "Trainable parameters: a share of the base's (0.3%) or a count (20M).",
        metavar="SHARE|COUNT",
    )
    rank: int | None = setting(None, "Rank of the low-rank part of every linear layer, instead of --budget.")
    density: float | None = setting(None, "Share of each weight matrix that gets a sparse value, instead of --budget.")
    sparse_per_layer: int | None = setting(None, "Sparse values per decoder layer, instead of --density.")
    sparse_share: float = setting(0.5, "Part of the budget given to the sparse part: 0 is LoRA, 1 is sparse only.")
    low_rank: str = setting(
        "lora",
        "Form of the low-rank part: the product of two matrices (lora), of one with itself (singlora), or of a basis "
        "that all layers share with a small core for each (shared).",
        metavar="FORM",
    )
    alpha: float = setting(16.0, "Scale of the low-rank part: its product is multiplied by alpha / rank.")
    dropout: float = setting(0.0, "Dropout on the input of the low-rank part while training.")
    sparse_init: str = setting(
        "residual",
        "Where sparse values start: the quantisation error of their position, or zero.",
        choices=SPARSE_INITS,
    )
    low_rank_init: str = setting(
        "lora",
        "Where the low-rank part starts: at no change (lora), or at the best low-rank fit of the "
        "quantisation error, weighted by the activations (svd).",
        choices=LOW_RANK_INITS,
    )
    rank_by: str | None = setting(
        None,
        "Where the budget's ranks go once no more fit everywhere: cheapest matrices first, from the last layer down "
        "(order), or largest squared gradients per parameter first (sensitivity), measured on --mask-samples training "
        "rows before training.  [default: sensitivity where the budget leaves matrices without a rank, else order]",
        choices=RANK_ORDERS,
    )

    def __post_init__(self) -> None:
        sized = [name for name in ("rank", "density", "sparse_per_layer") if getattr(self, name) is not None]
        if self.budget is None and not sized:
            raise InputError("no budget given", "say how much to train: --budget 0.3%, or --rank 16 --density 0.6%")
        if self.budget is not None and sized:
            raise InputError(
                f"--budget and --{sized[0].replace('_', '-')} contradict each other",
                "give a budget, or a rank with a density, not both",
            )
        if self.budget is not None:
            parse_budget(self.budget)
        if self.density is not None and self.sparse_per_layer is not None:
            raise InputError("--density and --sparse-per-layer contradict each other", "give one of them")
        if self.rank is not None and not 0 <= self.rank <= 4096:
            raise InputError(f"rank {self.rank} is out of range", "use a rank from 0 (no low-rank part) to 4096")
        if self.density is not None and not 0 <= self.density <= 0.5:
            raise InputError(f"density {self.density:g} is out of range", "use a density from 0 to 50%, such as 0.6%")
        if self.sparse_per_layer is not None and self.sparse_per_layer < 0:
            raise InputError(f"--sparse-per-layer {self.sparse_per_layer} is negative", "use a count such as 5120")
        if self.budget is None and not self.rank and not self.density and not self.sparse_per_layer:
            raise InputError("rank 0 with density 0 trains nothing", "raise --rank or --density")
        check_range("sparse_share", self.sparse_share, 0, 1)
        if self.rank_by == "sensitivity" and (self.budget is None or self.sparse_share == 1):
            raise InputError(
                "--rank-by sensitivity shares out a budget's ranks, and there are none to share out",
                "give a --budget with a --sparse-share below 1, or leave --rank-by at order",
            )
        check_positive("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"--dropout {self.dropout:g} is out of range", "use a share from 0 up to, not including, 1"
            )


@dataclass(frozen=True)
class MaskConfig:
    """How the positions of the sparse part are chosen."""

    mask_score: str = setting(
        "squared",
        f"What ranks the positions: {describe_scores()}. "
        "Gradients are taken row by row, so scores depend on the rows alone, not on the micro-batch.",
        choices=tuple(MASK_SCORES),
    )
    mask_scope: str = setting(
        "matrix", "Pick the best positions of each matrix, or of the whole model.", choices=MASK_SCOPES
    )
    mask_selection: str | None = setting(
        None,
        "How the score's statistic is collected: whole, in as many passes over the rows as memory asks for (exact), or "
        "in one pass that keeps the best positions only (stream).  [default: exact where that takes one pass]",
        choices=MASK_SELECTIONS,
    )
    mask_samples: int = setting(64, "Training rows that the score is averaged over.")
    mask_memory: str | None = setting(
        None, "Most memory for the score's statistic; less means fewer candidates, or more passes.", metavar="SIZE"
    )
    warmup_steps: int | None = setting(
        None, "Low-rank-only steps before the masks are picked.  [default: a tenth of all steps, at most 64]"
    )

    def __post_init__(self) -> None:
        check_positive("mask_samples", self.mask_samples)
        if self.mask_memory is not None:
            parse_size(self.mask_memory, "--mask-memory")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"--warmup-steps {self.warmup_steps} is negative", "use 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and what is held out."""

    data: tuple[str, ...] = setting(
        (),
        "Training rows: a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file (packed or not), a folder, or a "
        "Hugging Face dataset id; give it several times to mix, FILE=0.3 to take 30% of the rows.",
        metavar="FILE|FOLDER|ID[=SHARE]",
        repeated=True,
    )
    eval_data: str | None = setting(None, "Rows to evaluate on while training, in the same formats.", metavar="FILE")
    eval_split: str | None = setting(
        None,
        "What to hold out for evaluation instead: a share of the training rows, or a split of the folder or data set "
        "in --data (validation, test).",
        metavar="SHARE|SPLIT",
    )
    seq_len: int | None = setting(
        None,
        "Longest row in tokens; longer texts are cut into pieces, longer rows of other kinds at their end.  "
        "[default: the model's limit, at most 2048]",
    )
    train_on: str = setting(
        "completion",
        "Tokens that carry loss: completions only, the last completion of each row, or all of them.",
        choices=("completion", "last", "all"),
    )
    columns: str | None = setting(
        None,
        "What the data calls its columns, such as prompt=question,completion=answer; the others are then passed over.",
        metavar="NAME=COLUMN,...",
    )
    chat_template: str | None = setting(
        None, "A chat template to use instead of the model's own; the run and its exports keep it.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.eval_data is not None and self.eval_split is not None:
            raise InputError("--eval-data and --eval-split contradict each other", "give one of them")
        if self.eval_split is not None and self.eval_split not in SPLITS:
            parse_share(self.eval_split, "--eval-split")
        if self.seq_len is not None and self.seq_len < 2:
            raise InputError(f"--seq-len {self.seq_len} is too short", "use 2 or more tokens; 512 to 4096 is usual")


@dataclass(frozen=True)
class TrainConfig:
    """How the training loop runs."""

    objective: str = setting(
        "sft",
        f"What is learnt: {describe_objectives()}.",
        choices=tuple(OBJECTIVES),
    )
    beta: float = setting(
        0.1,
        "How strongly dpo and kto hold the model to the base: their loss is of beta times the margin. For orpo, what "
        "the preference counts beside the chosen answer.",
    )
    desirable_weight: float = setting(1.0, "What a row counts for kto whose label is true.")
    undesirable_weight: float = setting(1.0, "What a row counts for kto whose label is false.")
    batch_size: int = setting(
        32, "Sequences (for dpo and orpo: pairs of them) per optimizer step, over all micro-batches and cards."
    )
    micro_batch: str = setting("auto", "Sequences computed at once, or auto.", metavar="N|auto")
    packing: str = setting(
        "auto",
        "Lay the rows of a training micro-batch end to end, each attending to itself alone, instead of padding them to "
        "one length: where padding would be much of the work (auto), always, or never.",
        choices=("auto", "on", "off"),
    )
    epochs: float | None = setting(None, "Passes over the training rows.  [default: 1, unless --max-steps]")
    max_steps: int | None = setting(None, "Optimizer steps, instead of --epochs.")
    lr: float | None = setting(
        None,
        "Learning rate of the low-rank part.  [default: auto, from the model's width, --alpha and the number of steps]",
        metavar="RATE|auto",
        auto=True,
    )
    sparse_lr: float | None = setting(
        None,
        "Learning rate of the sparse part.  [default: auto, two sevenths of --lr at alpha 16]",
        metavar="RATE|auto",
        auto=True,
    )
    schedule: str = setting("linear", "Learning-rate decay.", choices=SCHEDULES)
    lr_warmup: float = setting(0.03, "Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = setting(0.0, "Decoupled weight decay of the adapter.")
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.")
    optimizer: str = setting("adamw", f"Optimizer. {describe_optimizers()}.", choices=tuple(OPTIMIZERS))
    checkpointing: str = setting(
        "auto",
        "Recompute activations in backward to save memory.",
        choices=("auto", "on", "off"),
    )
    deterministic: str = setting(
        "on",
        "On a card: the same bits every time, also after --resume; off is some per cent faster and takes less memory.",
        choices=("on", "off"),
    )
    eval_every: int | None = setting(
        None,
        "Steps between evaluations.  [default: only at the end; with --stop-after or --keep-best a twentieth of all "
        "steps]",
    )
    stop_after: int | None = setting(
        None,
        "Stop once this many evaluations in a row have not brought a lower held-out loss; those of the warm-up do not "
        "count.  [default: train all steps]",
    )
    keep_best: bool = setting(
        False, "End with the adapter of the evaluation with the lowest held-out loss, not with that of the last step."
    )
    samples: int = setting(
        0, "Held-out prompts that the model answers before training and at its end, for report.html to show."
    )
    save_every: int | None = setting(None, "Steps between checkpoints.  [default: a tenth of all steps]")
    keep: int = setting(2, "Newest checkpoints to keep.")
    log_to: tuple[str, ...] = setting((), "Also log to these, comma-separated.", choices=LOGGERS)
    base: str | None = setting(
        None,
        "Train on this 4-bit base, which 'qrosa quantize' made of --model.  [default: --model itself, in 4 bits]",
        metavar="FOLDER",
    )
    base_rounding: str = setting(
        "nearest",
        "How --model is brought to 4 bits: to the nearest level while it is loaded, or with error feedback on the "
        "training rows, which takes some minutes first and loses less.",
        choices=BASE_ROUNDINGS,
    )
    seed: int = setting(42, "Seed of data order, initial values, dropout and random masks.")
    offload: str = setting(
        "auto",
        "What to keep in host memory: auto, none, or some of activations, base and optimizer, with commas. "
        "base=disk:FOLDER maps the base from files, optimizer=nvme:FOLDER keeps the optimizer on a drive.",
        metavar="auto|none|PARTS",
    )
    deepspeed: str | None = setting(
        None,
        "Share masters, gradients and optimizer states over all processes with DeepSpeed: stage 2, stage 3, or as a "
        "file says.",
        metavar="zero2|zero3|FILE.json",
    )
    sync_every: int = setting(
        1,
        "Steps that each machine takes on its own before the machines' adapters are averaged, for machines that a slow "
        "network joins; 1 sums gradients in every step.",
    )
    outer_lr: float = setting(
        1.0, "With --sync-every: learning rate of the step that takes the machines' averaged moves; 1 takes them whole."
    )
    outer_momentum: float = setting(
        0.0, "With --sync-every: Nesterov momentum of that step, for runs of hundreds of meetings."
    )
    timeout: float = setting(
        1800.0, "Seconds that one of several processes waits for the others before the run ends with an error."
    )
    vram: str | None = setting(None, "Hard cap on device memory, such as 24GB.  [default: the card's]", metavar="SIZE")
    host_memory: str | None = setting(
        None,
        "Host memory that a plan may count on, such as 32GB; all processes of a machine share it.  [default: what is "
        "free here]",
        metavar="SIZE",
    )

    def __post_init__(self) -> None:
        weights = ("beta", "desirable_weight", "undesirable_weight")
        for name in ("batch_size", *weights, "max_grad_norm", "keep", "timeout", "sync_every", "outer_lr"):
            check_positive(name, getattr(self, name))
        for name in ("lr", "sparse_lr", "max_steps", "epochs", "eval_every", "stop_after", "save_every"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not 0 <= self.samples <= 100:
            raise InputError(f"--samples {self.samples} is out of range", "use 0 to 100; each takes some seconds")
        if self.epochs is not None and self.max_steps is not None:
            raise InputError("--epochs and --max-steps contradict each other", "give one of them")
        if self.base is not None and self.base_rounding == "feedback":
            raise InputError("--base and --base-rounding feedback contradict each other", "leave one of them out")
        if self.packing == "on" and self.goal.compares:
            raise InputError(
                f"--packing on and --objective {self.objective} contradict each other: compared answers are padded",
                "leave --packing at auto",
            )
        if self.micro_batch != "auto" and not (self.micro_batch.isdigit() and int(self.micro_batch) > 0):
            raise InputError(f"--micro-batch {self.micro_batch!r} is not a count", "use a number such as 4, or auto")
        check_range("lr_warmup", self.lr_warmup, 0, 1)
        check_range("weight_decay", self.weight_decay, 0, 1)
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed {self.seed} is out of range", "use a seed from 0 to 2147483647")
        if self.vram is not None:
            parse_size(self.vram, "--vram")
        if self.host_memory is not None:
            parse_size(self.host_memory, "--host-memory")
        chosen = parse_offload(self.offload)
        if chosen.base and self.checkpointing == "off":
            raise InputError(
                "--offload base needs recomputed activations, and --checkpointing is off",
                "leave --checkpointing at auto",
            )
        if chosen.activations and self.checkpointing == "off":
            raise InputError(
                "--offload activations keeps what checkpointing keeps, and --checkpointing is off",
                "leave --checkpointing at auto",
            )
        if self.deepspeed is not None and self.deepspeed not in ("zero2", "zero3"):
            if not self.deepspeed.endswith(".json"):
                raise InputError(
                    f"--deepspeed {self.deepspeed!r} is unknown", "use zero2, zero3, or the path of a .json file"
                )
        if (self.deepspeed is not None or chosen.optimizer) and not OPTIMIZERS[self.optimizer].shared:
            flag = "--deepspeed" if self.deepspeed is not None else "--offload optimizer"
            raise InputError(
                f"{flag} runs {SHARED.words}, and --optimizer is {self.optimizer}",
                f"leave --optimizer at {SHARED.name}, or leave {flag} out",
            )

        self._check_meetings()

    def _check_meetings(self) -> None:
        """Refuse what machines that step on their own cannot do."""
        if not 0 <= self.outer_momentum < 1:
            raise InputError(
                f"--outer-momentum {self.outer_momentum:g} is out of range", "use 0 (none) up to, not including, 1"
            )
        if self.sync_every == 1:
            return
        if self.deepspeed is not None or parse_offload(self.offload).optimizer:
            flag = "--deepspeed" if self.deepspeed is not None else "--offload optimizer"
            raise InputError(
                f"{flag} shares the optimizer over all processes in every step, and --sync-every has them apart",
                "leave out one of the two",
            )
        if self.base_rounding == "feedback":
            raise InputError(
                "--base-rounding feedback makes the base on one machine, and --sync-every is for machines apart",
                "make it with 'qrosa quantize', take it to each machine, and name it with --base",
            )

    @property
    def goal(self) -> Objective:
        """The objective, with all that depends on which one it is."""
        return OBJECTIVES[self.objective]

    @property
    def step_rows(self) -> int:
        """Sequences of an optimizer step."""
        return self.batch_size * self.goal.group


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run: the model, where the run goes, and the four groups of settings."""

    model: str
    output: str
    adapter: AdapterConfig
    masks: MaskConfig
    data: DataConfig
    train: TrainConfig

    @property
    def groups(self) -> Groups:
        """The settings without the places."""
        return Groups(self.adapter, self.masks, self.data, self.train)


class Groups(NamedTuple):
    """The settings without the places that a run reads from and writes to."""

    adapter: AdapterConfig
    masks: MaskConfig
    data: DataConfig
    train: TrainConfig


GROUPS: dict[str, type] = {"adapter": AdapterConfig, "masks": MaskConfig, "data": DataConfig, "train": TrainConfig}
_MOST_YAML = 1 << 20  # characters of a config file
_PLAIN_KEYS = ("model", "output")
_Group = TypeVar("_Group")


def setting_names() -> list[str]:
    """Every key that a YAML config may hold, with underscores."""
    return [*_PLAIN_KEYS, *(f.name for group in GROUPS.values() for f in dataclasses.fields(group))]


def make_group(group: type[_Group], values: Mapping[str, Any]) -> _Group:
    """Build one settings group from flat values; keys of other groups are passed over.

    Args:
        group: One of the config dataclasses.
        values: Setting name (underscores) -> value, text or already typed. ``None`` means not given.
    """
    hints = typing.get_type_hints(group)
    given = {
        f.name: coerce(f.name, values[f.name], hints[f.name], f.metadata.get("choices"), f.metadata["repeated"])
        for f in dataclasses.fields(group)  # type: ignore[arg-type]
        if values.get(f.name) is not None and not (f.metadata["auto"] and values[f.name] == "auto")
    }
    return group(**given)


def make_groups(values: Mapping[str, Any]) -> Groups:
    """Build all groups from flat values; keys of none are passed over."""
    return Groups(*(make_group(group, values) for group in GROUPS.values()))


def make_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a whole run's config from flat values (YAML keys overlaid with flags).

    Raises:
        InputError: An unknown key, a value of the wrong type, or settings that contradict each other.
    """
    known = setting_names()
    for key in values:
        if key not in known:
            raise InputError(f"unknown setting {quoted(key)}", suggest(str(key), known))
    for key, flag in (("model", "--model"), ("output", "--output"), ("data", "--data")):
        if not values.get(key):
            raise InputError(f"{flag} is missing", f"give {flag}, or {key}: in the config file")
    for key in _PLAIN_KEYS:
        if not isinstance(values[key], (str, Path)):
            raise InputError(f"--{key} has the wrong type: {quoted(values[key])}", "give a path or a name as text")
    return RunConfig(str(values["model"]), str(values["output"]), *make_groups(values))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML config; hyphens in keys become underscores.

    Raises:
        InputError: The file does not exist, is not valid YAML, or is not one flat mapping.
        StorageError: The file cannot be read.
    """
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise InputError(f"config file {path} is not a file", "check the path given to --config")
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_YAML + 1)
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist", "check the path given to --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"config file {path} cannot be read: {error}", "check the file's permissions") from None
    loaded = _parse_yaml(path, text)
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    known = setting_names()
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {quoted(key)} in {path}", suggest(key, known))
    return values


def _parse_yaml(path: str | Path, text: str) -> dict[Any, Any]:
    """The mapping in a config file; tags, and aliases, whose expansion has no bound, are refused."""
    import yaml

    hint = "write one 'key: value' a line"
    if len(text) > _MOST_YAML:
        raise InputError(f"config file {path} is longer than {_MOST_YAML} characters", hint)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InputError(f"config file {path} holds aliases (*name)", hint)
        loaded = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"config file {path} is not valid YAML{where}", hint) from None
    except (ValueError, RecursionError, OverflowError):  # a number of thousands of digits, brackets without end
        raise InputError(f"config file {path} holds a value that no setting has", hint) from None
    if not isinstance(loaded, dict):
        raise InputError(f"config file {path} is not a mapping", hint)
    return loaded


def to_flat(config: RunConfig) -> dict[str, Any]:
    """The config as one flat mapping of plain values, as written to ``config.yaml``."""
    flat: dict[str, Any] = {"model": config.model, "output": config.output}
    for name in GROUPS:
        for key, value in dataclasses.asdict(getattr(config, name)).items():
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
