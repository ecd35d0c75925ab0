"""Everything that can refuse a run, before a single file is written or a weight is loaded.

In the order of cost: the output folder, the packages asked for, the base's headers, the budget, the rows, the plan.
What comes out is all that the run needs, settings resolved: where the user left a choice open, it is made here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.adapters.budget import Allocation, allocate
from qrosa.adapters.rank_order import with_rank_order
from qrosa.base.shape import ModelShape
from qrosa.base.shape_source import read_shape
from qrosa.base.speech import Speech
from qrosa.config import SPLITS, RunConfig
from qrosa.data.length import row_length
from qrosa.data.rendering import read_template
from qrosa.errors import InputError
from qrosa.optim.rates import Rates, choose_rates
from qrosa.optim.schedule import Phases, steps_between_evaluations, steps_between_saves, warmup_and_total
from qrosa.optim.zero.settings import ZeroSettings, zero_settings
from qrosa.planner.bytes.zero import drive_bytes
from qrosa.planner.hardware import Here, processes_here, read_here
from qrosa.planner.plan import Plan
from qrosa.planner.reasons import reasons
from qrosa.planner.request import Rows, known_rows, make_request
from qrosa.planner.search.alternatives import require_fit
from qrosa.planner.search.solve import solve
from qrosa.quantities import parse_share, parse_size
from qrosa.record.checkpoint import PLACES
from qrosa.record.folder import check_output, check_room
from qrosa.train.best import check_held_out
from qrosa.train.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qrosa.base.base_files import BaseFiles
    from qrosa.data.dataset import Dataset


@dataclass
class Prepared:
    """A run whose settings, base, rows and plan were all accepted.

    Attributes:
        config: Settings with every choice made.
        base_files: The base, opened.
        original: The 16-bit weights that it was or will be rounded from; None where they are not known.
        tokenizer: Its tokenizer.
        train: Training rows.
        heldout: Rows to evaluate on, or None.
        allocation: Where the trainable parameters go.
        phases: Length of the phases.
        plan: Memory of each phase, and the settings that fit.
        rates: Learning rates, and why.
        cap: Hard cap on the card's memory in bytes, or None.
        zero: What DeepSpeed is to do, or None for training without it.
    """

    config: RunConfig
    base_files: BaseFiles
    original: BaseFiles | None
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    heldout: Dataset | None
    allocation: Allocation
    phases: Phases
    plan: Plan
    rates: Rates
    cap: int | None
    zero: ZeroSettings | None = None

    @property
    def pad_id(self) -> int:
        """Token to pad with; it is masked, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    @property
    def speech(self) -> Speech:
        """How the trained model is to be asked, and how its answers end."""
        own = self.config.data.chat_template is None
        return Speech(self.train.report.ends, None if own else str(self.tokenizer.chat_template))

    def data_report(self) -> dict[str, Any]:
        """What became of the rows, as ``report.json`` says it."""
        told = dataclasses.asdict(self.train.report)
        return told | ({"heldout": dataclasses.asdict(self.heldout.report)} if self.heldout else {})

    def unused(self) -> list[str]:
        """What is not used as it stands in the data, a text for people for each of the two sets of rows."""
        reports = {"training rows": self.train.report}
        if self.heldout is not None:
            reports["held-out rows"] = self.heldout.report
        return [text for name, report in reports.items() if (text := report.told(name))]

    def told(self) -> list[str]:
        """What people should know before anything runs: what is not used of the data, and choices made by rule."""
        made = [self.rates.reason] if self.rates.reason else []
        if self.plan.work.packed:
            made.append(f"packing: {reasons(self.plan)['packing']}")
        return [*self.unused(), *made]

    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must find unchanged."""
        held_out = self.heldout.fingerprint() if self.heldout else "none"
        return {"model": self.base_files.fingerprint(), "data": f"{self.train.fingerprint()}+{held_out}"}


def prepare(
    config: RunConfig, *, resume: bool = False, force: bool = False, dry_run: bool = False, locked: bool = False
) -> Prepared:
    """Check and resolve a run; nothing is written.

    Args:
        config: The settings as given.
        resume: Go on with the run in the output folder.
        force: Start over in a folder that holds a run.
        dry_run: The output folder is not looked at.
        locked: It was looked at already, by who holds its lock.

    Raises:
        InputError: Anything about the settings, the base, the rows or the output.
        DoesNotFitError: The plan does not fit the memory asked for.
        StorageError: Damaged, unreadable or unwritable files.
    """
    from qrosa.base.open import open_base
    from qrosa.train.base import given_base

    if not (dry_run or locked):
        check_output(Path(config.output), resume=resume, force=force)
    check_trackers(config.train.log_to)
    zero = _deepspeed(config, dry_run=dry_run)
    named = open_base(config.model)
    original = None if named.kind == "nf4" else named
    base_files = named if config.train.base is None else given_base(config.train.base, named)
    _check_objective(config)
    check_held_out(config)
    if original is None and config.train.base_rounding == "feedback":
        raise InputError(
            f"{config.model} is in 4 bits already, so --base-rounding has nothing to round",
            "give the 16-bit model, or leave --base-rounding out",
        )
    shape = read_shape(config.model)
    here = _here(config) if not dry_run else read_here()
    adapter = with_rank_order(config.adapter, shape.linears, shape.base_parameters)
    config = dataclasses.replace(config, adapter=adapter)
    allocation = allocate(config.adapter, shape.linears, shape.base_parameters)
    tokenizer = base_files.tokenizer()
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    seq_len = row_length(config.data.seq_len, getattr(base_files.config, "max_position_embeddings", None))
    train, heldout = load_data(config, tokenizer, seq_len, getattr(base_files.config, "vocab_size", None))
    phases = warmup_and_total(
        config, train.examples, low_rank=allocation.low_rank_parameters > 0, sparse=allocation.nnz_total > 0
    )
    reports = [rows.report for rows in (train, heldout) if rows]
    rows = known_rows(
        train.lengths,
        config.train,
        longest=max(report.longest for report in reports),
        tokens=sum(report.tokens for report in reports),
    )
    plan, cap = _plan(config, shape, allocation, rows, here)
    if not dry_run:
        require_fit(plan)
        check_room(Path(config.output), max(phase.disk for name, phase in plan.phases.items() if name != "export"))
        if zero is not None and zero.nvme is not None:
            needed = drive_bytes(plan.work) * here.sharing
            check_room(Path(zero.nvme).expanduser(), needed, "free some of it, or name a folder on another drive")
    rates = choose_rates(
        width=shape.dims.hidden,
        alpha=config.adapter.alpha,
        steps=phases.total,
        low_rank=config.train.lr,
        sparse=config.train.sparse_lr,
        preferences=config.train.goal.compares,
    )
    config = _resolve(config, seq_len, phases, plan, rates)
    return Prepared(config, base_files, original, tokenizer, train, heldout, allocation, phases, plan, rates, cap, zero)


def _check_objective(config: RunConfig) -> None:
    """Refuse settings that preferences cannot be learnt with.

    Raises:
        InputError: There is one.
    """
    if config.train.goal.compares and config.adapter.dropout > 0:
        raise InputError(
            f"--objective {config.train.objective} compares log-probabilities, which --dropout makes random",
            "leave --dropout at 0",
        )
    least = 2 * processes_here()
    if config.train.goal.mismatched and config.train.batch_size < least:
        raise InputError(
            f"--objective {config.train.objective} compares each row of a step with another, and --batch-size is "
            f"{config.train.batch_size}",
            f"use a --batch-size of {least} or more, two rows a process; 16 and above is usual",
        )


def _deepspeed(config: RunConfig, *, dry_run: bool) -> ZeroSettings | None:
    """What DeepSpeed is to do, which it is asked whether it can."""
    settings = zero_settings(config.train)
    if settings is not None and not dry_run:
        from qrosa.optim.zero.engine import check_available

        check_available(settings, "cuda" if _on_card() else "cpu")
    return settings


def _on_card() -> bool:
    """Whether accelerate will put the run on a card."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _here(config: RunConfig) -> Here:
    """What this machine has for the run, and what a process takes of its card."""
    here = read_here()
    if not _on_card():
        return here
    from qrosa.model.card import measure_overhead, with_index

    overhead = measure_overhead(with_index("cuda"), here.card_free, strict=config.train.deterministic == "on")
    return dataclasses.replace(here, overhead=overhead)


def _plan(
    config: RunConfig, shape: ModelShape, allocation: Allocation, rows: Rows, here: Here
) -> tuple[Plan, int | None]:
    """The plan for the device that the run will use, and the cap it holds itself to."""
    on_card = _on_card()
    cap = parse_size(config.train.vram, "--vram") if config.train.vram is not None else None
    if on_card and cap is not None:
        cap = min(cap, here.card_room or cap)  # a cap above what the card has free promises nothing
    device = "cuda" if on_card else "cpu"
    return solve(make_request(shape, config.groups, here, rows=rows, vram=cap, device=device), allocation), cap


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, seq_len: int, vocabulary: int | None
) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows if some were asked for."""
    from qrosa.data.dataset import EVAL_SPLITS, load_rows

    data = config.data

    def load(sources: Sequence[str], split: str | Sequence[str]) -> Dataset:
        return load_rows(
            sources,
            tokenizer,
            seq_len=seq_len,
            train_on=data.train_on,
            split=split,
            columns=data.columns,
            vocabulary=vocabulary,
            seed=config.train.seed,
            answers=config.train.goal.answers,
        )

    train = load(data.data, "train")
    if train.answers == "judged" and train.report.unwanted in (0, train.report.rows):
        raise InputError(
            f"the label of all {train.report.rows} rows is {str(not train.report.unwanted).lower()}, so there is "
            "nothing to tell apart",
            "give rows of both labels; wanted answers alone are learnt with --objective sft",
        )
    if data.eval_data is not None:
        return train, load([data.eval_data], EVAL_SPLITS)
    if data.eval_split in SPLITS:
        return train, load(data.data, data.eval_split)
    share = parse_share(data.eval_split, "--eval-split") if data.eval_split is not None else 0.0
    return train.split(share, config.train.seed) if share > 0 else (train, None)


def with_absolute_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings in which every local file and folder is named from the root, for use in other working folders."""

    def absolute(place: Any) -> Any:
        if isinstance(place, (list, tuple)):
            return [absolute(item) for item in place]
        if not isinstance(place, str) or not place:
            return place
        path, equals, share = place.rpartition("=")  # --data FILE=0.3
        for name, rest in ((place, ""), (path, equals + share)):
            if name and Path(name).expanduser().exists():
                return str(Path(name).expanduser().absolute()) + rest
        return place

    return {name: absolute(value) if name in PLACES else value for name, value in settings.items()}


def _resolve(config: RunConfig, seq_len: int, phases: Phases, plan: Plan, rates: Rates) -> RunConfig:
    """The settings with every open choice filled in."""
    train = config.train
    epochs = 1.0 if train.epochs is None and train.max_steps is None else train.epochs
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=seq_len),
        masks=dataclasses.replace(
            config.masks,
            warmup_steps=phases.warmup,
            mask_selection=plan.mask_selection or config.masks.mask_selection,
        ),
        train=dataclasses.replace(
            train,
            epochs=epochs,
            lr=rates.low_rank,
            sparse_lr=rates.sparse,
            micro_batch=str(plan.work.rows),
            packing="on" if plan.work.packed else "off",
            checkpointing="on" if plan.work.checkpointing else "off",
            offload=plan.offload,
            eval_every=steps_between_evaluations(train, phases.total),
            save_every=steps_between_saves(train, phases.total),
        ),
    )
