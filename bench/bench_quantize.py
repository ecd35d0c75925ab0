"""How near 4 bits come to 16 in the same bytes, on text that no calibration saw.

    python bench/bench_quantize.py                                  # every recipe; an hour and more on two busy cores
    python bench/bench_quantize.py --recipes "tokens weighed;tokens weighed + 0.3%" --windows 16

SmolLM2-135M-Instruct. For each recipe (bench/rounding.py) the share of the loss in log-likelihood that rounding to
nearest costs and the recipe wins back, on newsgroup posts, tales and source code, with a standard error (jackknife over
stretches of 51 tokens: neighbours share their context). All are measured on the same windows of 256 tokens, computed
in bf16 as on a card, the 16-bit model too.

What is done is kept in the cache folder, block by block and domain by domain: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.assets import cache_folder, smollm2
from bench.measure import report
from bench.rounding import RECIPES, Recipe, importance_of, make, make_nearest, positions_of, put_into, slug
from bench.texts import UNSEEN, cut, descriptions, reviews, token_rows
from qrosa.base.base_files import BaseFiles
from qrosa.base.blocks import rounded_products
from qrosa.base.load import load_base
from qrosa.base.open import open_base
from qrosa.calibrate.rows import windows, written_by
from qrosa.files import read_tensors, write_tensors

LENGTH = 256
HELD_OUT = 16  # windows that `qrosa quantize` holds out by default: rows are drawn with them
STRETCH = 51
TOGETHER = 8  # windows whose logits exist at once
ORIGINAL = "original"


def main() -> None:
    """Make and measure, print each row as it is known, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=";".join(RECIPES), help="separated by semicolons")
    parser.add_argument("--rows", type=int, default=128, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="windows a domain: 64 are 16k tokens")
    arguments = parser.parse_args()
    names = [name for name in RECIPES if name in {"nearest", *arguments.recipes.split(";")}]
    bench = Bench(str(smollm2()), arguments.rows, arguments.windows)
    original = bench.measure(ORIGINAL)
    results: list[dict[str, Any]] = []
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        bench.make(name, names)
        found[name] = bench.measure(name)
        results.append(row(name, original, found["nearest"], found[name]))
        print(name, results[-1], flush=True)
    report(
        "quantize",
        results,
        model="SmolLM2-135M-Instruct",
        tokens={domain: losses.numel() for domain, losses in original.items()},
        calibration_windows=arguments.rows,
        window=LENGTH,
        perplexity_16_bit={domain: math.exp(float(losses.mean())) for domain, losses in original.items()},
    )


class Bench:
    """One model, its calibration rows and its measurements, all kept in the cache folder.

    Args:
        source: The 16-bit model's folder.
        rows: Calibration windows.
        windows: Windows of each domain.
    """

    def __init__(self, source: str, rows: int, windows: int) -> None:
        self.source, self.rows, self.windows = source, rows, windows
        self.folder = cache_folder() / "bench-quantize" / f"{Path(source).name}-{rows}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base_files: BaseFiles = open_base(source)
        self.tokenizer: Any = self.base_files.tokenizer()

    def make(self, name: str, names: list[str]) -> None:
        """Make a recipe, and with it the others of ``names`` that are calibrated on the same rows."""
        recipe = RECIPES[name]
        if recipe.calibration is None:
            make_nearest(self.base_files, name, self._positions(recipe), self.folder)
            return
        alike = {other: RECIPES[other] for other in names if RECIPES[other].calibration == recipe.calibration}
        sparse = self._positions(next((found for found in alike.values() if found.sparse), recipe))
        ids, kind = self._calibration(recipe.calibration), recipe.calibration
        importance: dict[str, Tensor] = {}
        if any(found.weighed for found in alike.values()):
            importance = importance_of(self.base_files, ids, self.folder / f"importance.{kind}.safetensors")
        make(self.base_files, ids, alike, importance, sparse, self.folder)

    def measure(self, name: str) -> dict[str, Tensor]:
        """Domain -> loss of each token [windows, 255] under a recipe, or of the 16-bit model."""
        model: Any = None
        found = {}
        for domain, texts in UNSEEN.items():
            path = self.folder / f"losses.{slug(name)}.{domain}.{self.windows}.safetensors"
            if not path.is_file():
                model = self._load(name) if model is None else model
                rows = token_rows(texts(), self.tokenizer, self.windows * LENGTH)
                ids = torch.tensor(cut(rows, self.windows, LENGTH))
                write_tensors(path, {"loss": token_losses(model, ids)})
            found[domain] = read_tensors(path)["loss"]
        return found

    def _positions(self, recipe: Recipe) -> dict[str, Tensor]:
        if not recipe.sparse:
            return {}
        kind = recipe.calibration or "mixed"
        return positions_of(self.base_files, self._calibration(kind), self.folder / f"positions.{kind}.safetensors")

    def _calibration(self, kind: str) -> Tensor:
        """Windows int64 [rows, L] of one kind of text; ``own`` is written by the model."""
        path = self.folder / f"rows.{kind}.safetensors"
        if not path.is_file():
            write_tensors(path, {"ids": self._read_rows(kind)})
        return read_tensors(path)["ids"]

    def _read_rows(self, kind: str) -> Tensor:
        if kind == "own":
            model, tokenizer = load_base(self.base_files, dtype=torch.float32)
            with rounded_products():
                return written_by(model, tokenizer, self.rows, LENGTH, 0)
        return windows(mixed_rows(self.tokenizer, self.rows), self.rows + HELD_OUT, LENGTH, 0)[: self.rows]

    def _load(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.bfloat16).eval()
        if name != ORIGINAL:
            put_into(model, name, self.folder)
        return model


def mixed_rows(tokenizer: Any, count: int) -> list[list[int]]:
    """Token rows for ``count`` calibration windows and those held out: half film reviews, half package descriptions."""
    half = (count + HELD_OUT) * LENGTH // 2
    return token_rows(reviews(), tokenizer, half) + token_rows(descriptions(), tokenizer, half)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first of each window, fp32 [B, L - 1]."""
    losses = []
    for part in ids.split(TOGETHER):
        for logits, row in zip(model(input_ids=part, use_cache=False).logits, part, strict=True):
            wide = logits[:-1].float()
            losses.append(wide.logsumexp(1) - wide.gather(1, row[1:, None]).squeeze(1))
    return torch.stack(losses)


def row(name: str, original: dict[str, Tensor], nearest: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, Any]:
    """A recipe's figures: perplexity and share won back, by domain."""
    recipe = RECIPES[name]
    return {
        "recipe": name,
        "calibration": recipe.calibration,
        "sparse": recipe.sparse,
        "rank": recipe.rank,
        "perplexity": {domain: math.exp(float(losses.mean())) for domain, losses in made.items()},
        "won_back": {domain: won_back(original, nearest, made, domain) for domain in made},
    }


def won_back(
    original: dict[str, Tensor], nearest: dict[str, Tensor], made: dict[str, Tensor], domain: str
) -> dict[str, float]:
    """The share of nearest's extra loss that a recipe wins back, and its jackknife standard error."""
    cost, left = (
        (losses[domain] - original[domain]).flatten().unfold(0, STRETCH, STRETCH).sum(1) for losses in (nearest, made)
    )
    without = 1 - (left.sum() - left) / (cost.sum() - cost)
    error = math.sqrt((len(left) - 1) / len(left) * float((without - without.mean()).square().sum()))
    return {"share": float(1 - left.sum() / cost.sum()), "error": error}


if __name__ == "__main__":
    main()
