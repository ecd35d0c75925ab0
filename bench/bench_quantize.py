"""How near 4 bits come to 16 in the same bytes, on text that no calibration saw.

    python bench/bench_quantize.py                         # every recipe; some 40 minutes on two idle cores
    python bench/bench_quantize.py --recipes nearest,feedback --windows 16

SmolLM2-135M-Instruct. For each recipe the share of the loss in log-likelihood that rounding to nearest costs and the
recipe wins back, on newsgroup posts, tales and source code, with a standard error (jackknife over stretches of 51
tokens: neighbours share their context). All recipes are measured on the same windows of 256 tokens.

What is done is kept in the cache folder, matrix by matrix and domain by domain: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.assets import cache_folder, smollm2
from bench.texts import UNSEEN, cut, descriptions, reviews, token_rows
from qrosa.base.adapter_io import load_adapter
from qrosa.base.load import load_base
from qrosa.calibrate.quantize import quantize
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.files import read_tensors, write_json, write_tensors

LENGTH = 256
STRETCH = 51


class Recipe(NamedTuple):
    """What is made of the 16-bit model: by rounding to nearest, or calibrated on rows of these kinds."""

    calibration: str | None
    density: float = 0.0
    rank: int = 0


RECIPES = {
    "original": None,
    "nearest": Recipe(None),
    "feedback": Recipe("mixed"),
    "feedback on own rows": Recipe("own"),
    "feedback on reviews": Recipe("reviews"),
    "feedback + 0.3%": Recipe("mixed", density=0.003),
    "feedback + 0.3% + rank 8": Recipe("mixed", density=0.003, rank=8),
}


def main() -> None:
    """Make and measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="with commas; original and nearest always are")
    parser.add_argument("--rows", type=int, default=128, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="windows a domain: 64 are 16k tokens")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantize.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    names = [name for name in RECIPES if name in {"original", "nearest", *arguments.recipes.split(",")}]
    losses = {name: measure(name, arguments.rows, arguments.windows) for name in names}
    results = []
    for name in names[1:]:
        won = {domain: won_back(losses["original"], losses["nearest"], losses[name], domain) for domain in UNSEEN}
        perplexity = {domain: math.exp(float(losses[name][domain].mean())) for domain in UNSEEN}
        results.append({"recipe": name, "won_back": won, "perplexity": perplexity})
        print(f"{name}: " + ", ".join(f"{domain} {w['share']:.1%} +- {w['error']:.1%}" for domain, w in won.items()))
    document = {
        "model": "SmolLM2-135M-Instruct",
        "tokens": {domain: losses["original"][domain].numel() for domain in UNSEEN},
        "calibration_windows": arguments.rows,
        "window": LENGTH,
        "perplexity_16_bit": {domain: math.exp(float(losses["original"][domain].mean())) for domain in UNSEEN},
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, document)
    print(json.dumps(document["perplexity_16_bit"]), f"wrote {arguments.output}")


def measure(name: str, rows: int, windows: int) -> dict[str, Tensor]:
    """Domain -> loss of each token [windows, 255] under a recipe."""
    folder = cache_folder() / "bench-quantize"
    folder.mkdir(exist_ok=True)
    slug = f"{name.replace(' ', '-')}-{rows}"
    model: Any = None
    found = {}
    for domain, texts in UNSEEN.items():
        path = folder / f"{slug}-{domain}-{windows}.safetensors"
        if not path.is_file():
            if model is None:
                model, tokenizer = load(name, folder / slug, rows)
            cuts = cut(token_rows(texts(), tokenizer, windows * LENGTH), windows, LENGTH)
            write_tensors(path, {"loss": token_losses(model, torch.tensor(cuts))})
        found[domain] = read_tensors(path)["loss"]
    return found


def load(name: str, folder: Path, rows: int) -> tuple[Any, Any]:
    """The model that a recipe makes, computing in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, source = RECIPES[name], str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(source)
    if recipe is None:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), tokenizer
    if recipe.calibration is None:
        return load_base(source, dtype=torch.float32)
    if not folder.is_dir():
        config = QuantizeConfig(source, str(folder), recipe.density, recipe.rank, rows, LENGTH)
        given = calibration_rows(recipe.calibration, tokenizer, (rows + config.held_out) * LENGTH)
        quantize(config, given, stage=lambda what, n, of: print(f"\r{name}: {what} {n}/{of}", end="", file=sys.stderr))
    model, _ = load_base(str(folder), dtype=torch.float32)
    if (folder / "adapter").is_dir():
        load_adapter(model, folder)
    return model, tokenizer


def calibration_rows(kind: str, tokenizer: Any, tokens: int) -> list[list[int]] | None:
    """Rows of a kind; None for those that the model writes itself."""
    if kind == "own":
        return None
    if kind == "reviews":
        return token_rows(reviews(), tokenizer, tokens)
    return token_rows(reviews(), tokenizer, tokens // 2) + token_rows(descriptions(), tokenizer, tokens - tokens // 2)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first of each window, fp32 [B, L - 1]."""
    losses = []
    for part in ids.split(4):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="none"))
    return torch.cat(losses)


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
