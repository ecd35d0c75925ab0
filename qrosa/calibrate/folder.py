"""The folder of a quantised model while it is made: one shard a decoder block, and how far it has come.

Work goes on in ``DIR.work`` beside DIR, which one rename makes DIR. A block's shard appears whole, by rename, as the
block is done, so work that was cut off goes on after its last whole block, and gives the same bytes. What must not
have changed in between (the base, the calibration's tokens, the settings) is written down first, and other work's
remains are thrown away.

Weights are stored as bitsandbytes and transformers store them: packed codes under the weight's own name, its companions
behind it, ``quantization_config`` in config.json. Any tool that reads 4-bit checkpoints reads this one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qrosa.adapters.low_rank import LowRank
from qrosa.base.base_files import BaseFiles
from qrosa.calibrate.matrices import Matrix
from qrosa.calibrate.page import page
from qrosa.errors import InputError
from qrosa.files import (
    read_json,
    read_safetensors_header,
    read_tensors,
    write_fault,
    write_json,
    write_tensors,
    write_text,
)
from qrosa.quant.nf4 import NF4Weight
from qrosa.sparse.csr import CsrDelta

REPORT_FILE, REPORT_PAGE = "report.json", "report.html"
ADAPTER_FOLDER = "adapter"
_IDENTITY = "identity.json"
_PARTS = "parts"
_INDEX = "model.safetensors.index.json"
_QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def check_output(target: Path, *, force: bool) -> None:
    """Refuse an output folder that is taken.

    Raises:
        InputError: It is a file, or not empty and not to be replaced, or holds something else than a quantised model.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"output {target} is a file", "give a folder as --output")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise InputError(f"output {target} exists and is not empty", "give another --output, or --force to replace it")
    if not (target / REPORT_FILE).is_file() or not (target / "config.json").is_file():
        raise InputError(
            f"output {target} is no quantised model, so --force does not replace it",
            "give another --output, or remove the folder yourself",
        )


class WorkFolder:
    """``DIR.work``, new or gone on with.

    Args:
        target: The folder that it becomes.
        identity: What must be the same for work to go on.
        blocks: Decoder blocks of the model.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], blocks: int) -> None:
        self.target, self.blocks = target.resolve(), blocks
        self.path = self.target.with_name(f"{self.target.name}.work")
        known = self.path / _IDENTITY
        if not known.is_file() or read_json(known) != identity:
            shutil.rmtree(self.path, ignore_errors=True)
            try:
                (self.path / _PARTS).mkdir(parents=True)
            except OSError as error:
                raise write_fault(self.path, error) from None
            write_json(known, dict(identity))

    def shard(self, index: int) -> Path:
        """Of a block; the last one, number ``blocks``, holds what lies outside the blocks."""
        return self.path / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def is_done(self, index: int) -> bool:
        """Whether a block's matrices and their repair lie here."""
        return self.shard(index).is_file()

    def write_block(self, index: int, matrices: Mapping[str, Matrix], dense: Mapping[str, Tensor]) -> None:
        """Store a block: the repair and the errors first, then the shard that makes it done."""
        repair: dict[str, Tensor] = {}
        errors: dict[str, Any] = {}
        for path, matrix in matrices.items():
            repair |= {f"{path}.{name}": tensor.cpu() for name, tensor in _repair(matrix).items()}
            errors[path] = {"nearest": matrix.nearest_error, "here": matrix.error}
        if repair:
            write_tensors(self.part(f"block-{index:05d}.safetensors"), repair)
        write_json(self.part(f"block-{index:05d}.json"), errors)
        stored = {name: tensor.cpu() for name, tensor in dense.items()}
        for path, matrix in matrices.items():
            stored |= stored_weight(f"{path}.weight", matrix.weight)
        write_tensors(self.shard(index), stored)

    def part(self, name: str) -> Path:
        """A file that is needed until the folder is finished."""
        return self.path / _PARTS / name

    def repair(self) -> dict[str, Tensor]:
        """The adapter's tensors of all blocks, as ``adapter_state`` names them."""
        files = sorted((self.path / _PARTS).glob("block-*.safetensors"))
        return {name: tensor for file in files for name, tensor in read_tensors(file).items()}

    def errors(self) -> dict[str, Any]:
        """Path -> relative squared output error of rounding to nearest, and of what was made here."""
        files = sorted((self.path / _PARTS).glob("block-*.json"))
        return {path: error for file in files for path, error in read_json(file).items()}

    def complete_model(self, base_files: BaseFiles, outside: Mapping[str, Tensor]) -> None:
        """Write what lies outside the blocks, the index, the config and the tokenizer: now it loads."""
        write_tensors(self.shard(self.blocks), {name: tensor.cpu() for name, tensor in outside.items()})
        weight_map, total = {}, 0
        for index in range(self.blocks + 1):
            for name, (_, _, (first, end)) in read_safetensors_header(self.shard(index))[0].items():
                weight_map[name] = self.shard(index).name
                total += end - first
        write_json(self.path / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        base_files.tokenizer().save_pretrained(self.path)
        generation = base_files.generation_config()
        if generation:
            write_json(self.path / "generation_config.json", generation)
        config = base_files.config.to_dict()
        write_json(self.path / "config.json", {**config, "quantization_config": _QUANTIZATION, "dtype": "bfloat16"})

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the report, drop what was needed on the way, and take the target's name."""
        write_json(self.path / REPORT_FILE, dict(report))
        write_text(self.path / REPORT_PAGE, page(self.target.name, report))
        shutil.rmtree(self.path / _PARTS)
        (self.path / _IDENTITY).unlink()
        try:
            if self.target.exists():
                shutil.rmtree(self.target)
            os.replace(self.path, self.target)
        except OSError as error:
            raise write_fault(self.target, error) from None


def stored_weight(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """A packed weight under the names that bitsandbytes gives its parts."""
    packed, state = weight.to_bnb()
    parts = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in {name: packed, **parts}.items()}


def _repair(matrix: Matrix) -> dict[str, Tensor]:
    """The adapter's tensors of a matrix."""
    tensors: dict[str, Tensor] = {}
    if matrix.positions is not None and matrix.positions.numel():
        delta = CsrDelta.from_positions(matrix.positions, matrix.weight.shape, matrix.values)
        tensors |= {"sparse_row_ptr": delta.row_ptr, "sparse_col": delta.col, "sparse_values": delta.values}
    if matrix.low_rank is not None:
        b, a = matrix.low_rank
        part = LowRank({"A": a.contiguous(), "B": b.contiguous()}, matrix.weight.shape, alpha=a.shape[0])
        tensors |= {name: tensor.detach() for name, tensor in part.tensors().items()}
    return tensors
