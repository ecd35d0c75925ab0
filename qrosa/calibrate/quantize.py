"""From a 16-bit model to a 4-bit base with its repair, block by block.

calibration rows -> what each token counts, and positions of the sparse part (squared error times squared gradient, over
the whole model), both by gradients on the base rounded to nearest -> one pass of the 16-bit model over the rows, each
block quantised as it passes -> the checkpoint, the adapter beside it, perplexity on rows that were held out.

Every block sees the 16-bit model's own activations, not those of the quantised blocks before it. So blocks do not wait
for each other's results, a block that is done needs only a forward pass when work goes on, and the codes of one
matrix depend on nothing but the base, the rows and the settings.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrosa.adapters.budget import Allocation, allocate
from qrosa.adapters.inject import linear_shapes, load_adapter_state, quantized_linears
from qrosa.adapters.rank_units import layer_index
from qrosa.base.adapter_io import save_adapter
from qrosa.base.base_files import BaseFiles
from qrosa.base.blocks import Block, BlockwiseModel, Run, rounded_products
from qrosa.base.build import empty_model
from qrosa.base.load import count_parameters, load_base
from qrosa.base.open import open_base
from qrosa.calibrate.folder import ADAPTER_FOLDER, WorkFolder, check_output
from qrosa.calibrate.importance import token_importance
from qrosa.calibrate.matrices import quantize_matrices
from qrosa.calibrate.planned import Planned, plan
from qrosa.calibrate.rows import windows, written_by
from qrosa.calibrate.settings import QuantizeConfig, describe
from qrosa.config import MaskConfig
from qrosa.data.encode import EncodedRow
from qrosa.errors import DoesNotFitError, InputError
from qrosa.eval.perplexity import evaluate_loss
from qrosa.files import read_json, read_tensors, write_json, write_tensors
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample
from qrosa.model.head import token_log_probs
from qrosa.model.heap import look_at_layers
from qrosa.quant.hessian import InputMoments
from qrosa.quantities import bytes_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stage = Callable[[str, int, int], None]
_SELECTION_ROWS = 32
_ROWS_FILE, _POSITIONS_FILE = "rows.safetensors", "positions.safetensors"
_IMPORTANCE_FILE = "importance.safetensors"
_NEAREST_FILE, _ORIGINAL_FILE = "nearest.json", "original.json"


def quantize(
    config: QuantizeConfig,
    rows: list[list[int]] | None = None,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Quantise a model and write it, its repair and a report to ``config.output``.

    Args:
        config: The settings.
        rows: Token rows to calibrate on; None lets the model write them.
        device: Where it is computed.
        force: Replace a quantised model in the output folder.
        stage: Called with (what is being done, done, in all).

    Returns:
        The contents of ``report.json``.

    Raises:
        InputError: The model is quantised already or cannot be a base, too few rows, or the output is taken.
        StorageError: Damaged files, or the output cannot be written.
    """
    check_output(Path(config.output), force=force)
    base_files = open_base(config.model)
    if base_files.kind == "nf4":
        raise InputError(f"{config.model} is already in 4 bits", "give the 16-bit model")
    return _Job(config, base_files, rows, torch.device(device), stage or (lambda *_: None)).go()


class _Job:
    """One model in the making."""

    def __init__(
        self,
        config: QuantizeConfig,
        base_files: BaseFiles,
        rows: list[list[int]] | None,
        device: torch.device,
        stage: Stage,
    ) -> None:
        self.config, self.base_files, self.device, self.stage = config, base_files, device, stage
        self.shell = empty_model(base_files.config)
        settings = config.adapter()
        self.allocation: Allocation | None = None
        if settings is not None:
            self.allocation = allocate(settings, linear_shapes(self.shell), count_parameters(self.shell))
        self.started = time.perf_counter()
        self.planned = self._plan()
        count = config.rows + config.held_out
        self.given = None if rows is None else windows(rows, count, config.length, config.seed)
        source = "the model's own" if self.given is None else hashlib.sha256(self.given.numpy().tobytes()).hexdigest()
        values = {key: value for key, value in asdict(config).items() if key not in ("model", "output")}
        identity = {"base": base_files.fingerprint(), "calibration": source, "settings": values}
        # Last: what can be refused was looked at.
        self.folder = WorkFolder(Path(config.output), identity, _blocks(self.shell))

    def _plan(self) -> Planned:
        """Bytes of the pass over the blocks, and its operations.

        Raises:
            DoesNotFitError: The card has less.
        """
        planned = plan(self.config, on_card=self.device.type == "cuda")
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if planned.peak > free:
                raise DoesNotFitError(
                    f"quantising takes {bytes_text(planned.peak)} of device memory, and {bytes_text(free)} is free",
                    "give fewer --rows or a smaller --seq-len, or --device cpu",
                )
        return planned

    def go(self) -> dict[str, Any]:
        """Everything in order; returns the report."""
        ids, nearest, importance, positions = self._on_nearest()
        calibration, held_out = ids[: -self._held_out(ids)], ids[-self._held_out(ids) :]
        blockwise = BlockwiseModel(self.base_files, self.device, self.config.micro_batch)
        sixteen = self._loss_16_bit(blockwise, held_out)
        self._quantize_blocks(blockwise, calibration, importance, positions)
        self.folder.complete_model(self.base_files, self._dense(blockwise.outside))
        del blockwise
        bare, repaired = self._write_adapter(held_out)
        losses = {"original": sixteen, "nearest": nearest, "base": bare}
        report = {
            **describe(
                self.config, ids, self._held_out(ids), losses | ({} if repaired is None else {"repaired": repaired})
            ),
            "base": self.base_files.fingerprint(),
            "planned": self.planned.to_json(),
            "matrices": self.folder.errors(),
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        self.folder.finish(report)
        return report

    def _held_out(self, ids: Tensor) -> int:
        """Windows at the end of the rows that no calibration sees; at most half."""
        return min(self.config.held_out, len(ids) // 2)

    def _on_nearest(self) -> tuple[Tensor, float, dict[str, Tensor], dict[str, Tensor]]:
        """Read off the base rounded to nearest: the rows, its loss, what tokens count, the sparse positions.

        Each is kept once known.
        """
        names = (_ROWS_FILE, _NEAREST_FILE, _IMPORTANCE_FILE, _POSITIONS_FILE)
        rows, loss, importance, positions = (self.folder.part(name) for name in names)
        model: PreTrainedModel | None = None
        if not all(file.is_file() for file in (rows, loss, importance, positions)):
            model, tokenizer = load_base(
                self.base_files, self.device, self._compute_dtype(), lambda n, of: self.stage("load", n, of)
            )
            if self.device.type == "cpu":
                look_at_layers(model)
            if not rows.is_file():
                write_tensors(rows, {"ids": self._windows(model, tokenizer)})
            ids = read_tensors(rows)["ids"]
            if not loss.is_file():
                write_json(loss, {"loss": self._loss(model, ids[-self._held_out(ids) :])})
            if not importance.is_file():
                write_tensors(importance, self._importance(model, ids[: -self._held_out(ids)]))
            if not positions.is_file():
                write_tensors(positions, self._positions(model, ids[: -self._held_out(ids)]))
        known = float(read_json(loss)["loss"])
        return read_tensors(rows)["ids"], known, read_tensors(importance), read_tensors(positions)

    def _windows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Calibration and held-out windows int64 [B, L], given or written."""
        if self.given is not None:
            return self.given
        count, length, seed = self.config.rows + self.config.held_out, self.config.length, self.config.seed
        with rounded_products():
            ids = written_by(model, tokenizer, count, length, seed, lambda n, of: self.stage("write rows", n, of))
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]

    def _importance(self, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        """What each calibration token counts, by matrix, fp32 [B, L]."""
        with rounded_products():
            return token_importance(model, ids, self.config.seed, lambda n, of: self.stage("weigh tokens", n, of))

    def _positions(self, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        """Flat positions of the sparse part by matrix; empty without one."""
        if self.allocation is None or not self.allocation.nnz_total:
            return {}
        masks = MaskConfig(mask_score="curvature", mask_scope="global", mask_samples=_SELECTION_ROWS)
        spread = torch.linspace(0, len(ids) - 1, min(_SELECTION_ROWS, len(ids))).long()
        samples = [Sample(row, row) for row in ids[spread].tolist()]
        with rounded_products():
            return choose_positions(
                model,
                samples,
                config=masks,
                nnz=self.allocation.nnz,
                seed=self.config.seed,
                progress=lambda n, of: self.stage("choose positions", n, of),
                base_files=self.base_files,
            )

    def _loss_16_bit(self, blockwise: BlockwiseModel, held_out: Tensor) -> float:
        """Of the original, block by block."""
        known = self.folder.part(_ORIGINAL_FILE)
        if not known.is_file():
            hidden = blockwise.run(held_out, lambda block, run: self._count("score", block, run()))
            targets = held_out[:, 1:].flatten().to(hidden.device)
            log_probs = token_log_probs(blockwise.model, hidden[:, :-1].flatten(0, 1), targets)
            write_json(known, {"loss": -float(log_probs.double().mean())})
        return float(read_json(known)["loss"])

    def _quantize_blocks(
        self, blockwise: BlockwiseModel, ids: Tensor, importance: dict[str, Tensor], positions: dict[str, Tensor]
    ) -> None:
        """The pass over the rows."""
        ranks = self.allocation.ranks if self.allocation else {}

        def visit(block: Block, run: Run) -> Tensor:
            if self.folder.is_done(block.index):
                with rounded_products():
                    return self._count("quantise", block, run())
            linears = block.linears()
            moments = InputMoments(linears, importance)
            with moments.watch(), rounded_products():
                output = run()
            matrices = quantize_matrices(
                linears, moments, positions, ranks, damping=self.config.damping, seed=self.config.seed
            )
            packed = {f"{path}.weight" for path in linears}
            names = [f"{block.path}.{name}" for name, _ in block.module.named_parameters()]
            self.folder.write_block(block.index, matrices, self._dense(name for name in names if name not in packed))
            return self._count("quantise", block, output)

        if not all(self.folder.is_done(block.index) for block in blockwise.blocks):
            blockwise.run(ids, visit)

    def _dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are not quantised, as they are stored."""
        return {name: self.base_files.read(name).to(torch.bfloat16) for name in names}

    def _count(self, what: str, block: Block, output: Tensor) -> Tensor:
        self.stage(what, block.index + 1, self.folder.blocks)
        return output

    def _write_adapter(self, held_out: Tensor) -> tuple[float, float | None]:
        """The adapter beside the base, where there is one; the loss without it and with it."""
        model, _ = load_base(str(self.folder.path), self.device, self._compute_dtype())
        bare = self._loss(model, held_out)
        settings = self.config.adapter()
        if settings is None:
            return bare, None
        load_adapter_state(model, self.folder.repair(), settings.alpha)
        model.qrosa_adapter = settings  # type: ignore[assignment]
        save_adapter(model, self.folder.path / ADAPTER_FOLDER, beside_base=True)
        return bare, self._loss(model, held_out)

    def _loss(self, model: nn.Module, ids: Tensor) -> float:
        """Mean over the tokens of windows."""
        rows = [EncodedRow(row, row) for row in ids.tolist()]
        return evaluate_loss(model, rows, progress=lambda n, of: self.stage("score", n, of))["loss"]

    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def _blocks(model: nn.Module) -> int:
    return 1 + max(layer_index(path) for path in quantized_linears(model))
