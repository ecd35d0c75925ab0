"""4-bit forms of one model, made side by side: one pass over its blocks for each set of calibration rows.

What ``qrosa quantize`` does to a block (``calibrate.matrices``) is done here for several recipes on the same second
moments, and each one's *effective* weights (base + sparse + low-rank part, rounded to bf16) are stored block by block,
to be put into the 16-bit model and measured. A block that is stored is not made again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qrosa.adapters.budget import allocate
from qrosa.adapters.inject import linear_shapes, target_linears
from qrosa.adapters.rank_units import layer_index
from qrosa.base.base_files import BaseFiles
from qrosa.base.blocks import Block, BlockwiseModel, Run, rounded_products
from qrosa.base.build import meta_model
from qrosa.base.load import count_parameters, load_base, read_dense
from qrosa.calibrate.importance import token_importance
from qrosa.calibrate.matrices import Matrix, quantize_matrices
from qrosa.config import AdapterConfig, MaskConfig
from qrosa.files import read_tensors, write_tensors
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample
from qrosa.quant.feedback import round_with_feedback
from qrosa.quant.hessian import DAMPING, InputMoments, factor
from qrosa.quant.maxima import search_maxima
from qrosa.quant.nf4 import NF4Weight

DENSITY = 0.003
SELECTION_ROWS = 32


class Recipe(NamedTuple):
    """One form.

    Attributes:
        calibration: Name of the rows; None rounds to nearest.
        searched: Block maxima are searched, not plain.
        weighed: Tokens count by what an error in them costs, not all alike.
        sparse: 0.3% sparse values repair it.
        rank: Of its low-rank part.
        damping: Share of the moments' mean diagonal that is added to it.
    """

    calibration: str | None
    searched: bool = True
    weighed: bool = True
    sparse: bool = False
    rank: int = 0
    damping: float = DAMPING


RECIPES = {
    "nearest": Recipe(None, weighed=False),
    "nearest + 0.3%": Recipe(None, weighed=False, sparse=True),
    "feedback, plain maxima": Recipe("mixed", searched=False, weighed=False),
    "feedback": Recipe("mixed", weighed=False),
    "tokens weighed": Recipe("mixed"),
    "tokens weighed + 0.3%": Recipe("mixed", sparse=True),
    "tokens weighed + 0.3% + rank 4": Recipe("mixed", sparse=True, rank=4),
    "tokens weighed + 0.3% + rank 8": Recipe("mixed", sparse=True, rank=8),
    "tokens weighed, damping 0.1": Recipe("mixed", damping=0.1),
    "tokens weighed, own rows": Recipe("own"),
    "tokens weighed, own rows, + 0.3%": Recipe("own", sparse=True),
}


def positions_of(base_files: BaseFiles, ids: Tensor, path: Path) -> dict[str, Tensor]:
    """Positions of the sparse part, chosen as ``qrosa quantize`` does; kept at ``path``."""
    if not path.is_file():
        model, _ = load_base(base_files, dtype=torch.float32)
        settings = AdapterConfig(density=DENSITY, alpha=1.0, dropout=0.0)
        allocation = allocate(settings, linear_shapes(model), count_parameters(model))
        masks = MaskConfig(mask_score="curvature", mask_scope="global", mask_samples=SELECTION_ROWS)
        spread = torch.linspace(0, len(ids) - 1, min(SELECTION_ROWS, len(ids))).long()
        samples = [Sample(row, row) for row in ids[spread].tolist()]
        with rounded_products():
            found = choose_positions(model, samples, config=masks, nnz=allocation.nnz, seed=0, base_files=base_files)
        write_tensors(path, found)
    return read_tensors(path)


def importance_of(base_files: BaseFiles, ids: Tensor, path: Path) -> dict[str, Tensor]:
    """What each calibration token counts, as ``qrosa quantize`` has it; kept at ``path``."""
    if not path.is_file():
        model, _ = load_base(base_files, dtype=torch.float32)
        with rounded_products():
            write_tensors(path, token_importance(model, ids, 0))
    return read_tensors(path)


def make(
    base_files: BaseFiles,
    ids: Tensor,
    recipes: Mapping[str, Recipe],
    importance: Mapping[str, Tensor],
    sparse: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Make the recipes of one set of calibration rows.

    Args:
        base_files: The 16-bit model.
        ids: The rows' windows int64 [B, L].
        recipes: Name -> recipe, all of this set.
        importance: Path -> what each token counts [B, L], where tokens are weighed.
        sparse: Path -> flat positions of the sparse part.
        folder: Where each recipe's blocks are stored.
    """
    blockwise = BlockwiseModel(base_files, torch.device("cpu"))
    if all(_file(folder, name, block.index).is_file() for name in recipes for block in blockwise.blocks):
        return

    def visit(block: Block, run: Run) -> Tensor:
        missing = {name: recipe for name, recipe in recipes.items() if not _file(folder, name, block.index).is_file()}
        linears = block.linears()
        kinds = {recipe.weighed for recipe in missing.values()}
        moments = {weighed: InputMoments(linears, importance if weighed else None) for weighed in kinds}
        with rounded_products(), ExitStack() as watching:
            for found in moments.values():
                watching.enter_context(found.watch())
            output = run()
        for name, recipe in missing.items():
            _store(folder, name, block.index, _block(linears, moments[recipe.weighed], recipe, sparse))
        print(f"block {block.index + 1} of {len(blockwise.blocks)}: {', '.join(missing) or 'there'}", flush=True)
        return output

    blockwise.run(ids, visit)


def make_nearest(base_files: BaseFiles, name: str, sparse: Mapping[str, Tensor], folder: Path) -> None:
    """Make a recipe that rounds to nearest, with exact values at the sparse positions."""
    blocks: dict[int, list[str]] = {}
    for path in target_linears(meta_model(base_files.config, torch.float32)):
        blocks.setdefault(layer_index(path), []).append(path)
    for index, paths in blocks.items():
        if not _file(folder, name, index).is_file():
            weights = {path: read_dense(base_files, f"{path}.weight").float() for path in paths}
            _store(folder, name, index, {path: _nearest(weights[path], sparse.get(path)) for path in paths})


def put_into(model: nn.Module, name: str, folder: Path) -> None:
    """Replace a 16-bit model's matrices by a recipe's."""
    with torch.no_grad():
        for file in sorted(folder.glob(f"{slug(name)}.*.safetensors")):
            for path, weight in read_tensors(file).items():
                model.get_submodule(path).weight.copy_(weight)  # type: ignore[operator, union-attr]


def slug(name: str) -> str:
    """A recipe's name for files."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _file(folder: Path, name: str, index: int) -> Path:
    return folder / f"{slug(name)}.{index:03d}.safetensors"


def _store(folder: Path, name: str, index: int, weights: Mapping[str, Tensor]) -> None:
    write_tensors(_file(folder, name, index), {path: weight.bfloat16() for path, weight in weights.items()})


def _block(
    linears: Mapping[str, nn.Linear], moments: InputMoments, recipe: Recipe, sparse: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Path -> effective weight fp32 [N, K]."""
    if not recipe.searched:
        return _plain(linears, moments, recipe.damping)
    chosen = {path: sparse[path] for path in linears if path in sparse} if recipe.sparse else {}
    own = copy.copy(moments)
    own.sums = dict(moments.sums)  # they are used up
    ranks = dict.fromkeys(linears, recipe.rank)
    made = quantize_matrices(linears, own, chosen, ranks, damping=recipe.damping, seed=0)
    return {path: effective(matrix) for path, matrix in made.items()}


def effective(matrix: Matrix) -> Tensor:
    """What a matrix and its repair make together, fp32 [N, K]."""
    weight = matrix.weight.dequantize(torch.float32)
    if matrix.positions is not None and matrix.values is not None:
        weight.view(-1)[matrix.positions] += matrix.values
    if matrix.low_rank is not None:
        weight += matrix.low_rank[0].float() @ matrix.low_rank[1].float()
    return weight


def _nearest(weight: Tensor, positions: Tensor | None) -> Tensor:
    """Rounded to nearest, sparse positions exact."""
    rounded = NF4Weight.quantize(weight).dequantize(torch.float32)
    if positions is not None:
        rounded.view(-1)[positions] = weight.reshape(-1)[positions]
    return rounded


def _plain(linears: Mapping[str, nn.Linear], moments: InputMoments, damping: float) -> dict[str, Tensor]:
    """Error feedback under each block's largest magnitude, as published."""
    made: dict[str, Any] = {}
    for group in moments.groups():
        factored = factor(moments.sums[group[0]], damping)
        for path in group:
            weight = linears[path].weight.detach().float()
            maxima = search_maxima(weight)
            codes = round_with_feedback(weight, maxima.expand(), factored).codes
            made[path] = maxima.with_codes(codes).dequantize(torch.float32)
    return made
