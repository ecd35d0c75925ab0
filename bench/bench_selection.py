"""What one-pass mask selection finds, what it costs, and where the plan needs it.

    python bench/bench_selection.py     # some 10 minutes on two idle cores; writes bench/results/selection-cpu.json
    python bench/bench_selection.py --parts all,cost    # some parts; those that are there stay

*Found* (parts completion and all, by the loss): streamed masks of SmolLM2 against exact ones, for 35 matrices spread
over its depth: the share of positions that both have, and the share of the exact mask's score that the streamed mask
holds. All masks of one loss come from the same backward passes. *Cost*: seconds a row of a pass that collects exact
statistics, of one that looks at whole gradients, and of one that adds at candidates, in turns with a training step's;
medians. *Planned*: passes of the plan for large models on small cards, with exact statistics and as it plans by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench import measure
from bench.assets import movie_reviews, smollm2
from bench.real_models import LARGE, MODELS
from qrosa.adapters.inject import inject_low_rank, layer_index, quantized_linears
from qrosa.base.load import load_base
from qrosa.base.shape import from_config
from qrosa.config import MaskConfig, make_groups
from qrosa.masks.candidates import MatrixCandidates, ModelCandidates
from qrosa.masks.exact import accumulate, adding_to
from qrosa.masks.observe import Receiver, observe, run_backward
from qrosa.masks.repair import set_masks
from qrosa.masks.residual import checkpoint_of, residual
from qrosa.masks.scores import MASK_SCORES, MaskScore
from qrosa.masks.select import choose_positions
from qrosa.masks.selection_rows import Sample, sample_loss
from qrosa.masks.sizes import CANDIDATE_FACTOR, DENSE_SAMPLES, candidates_of, candidates_of_model
from qrosa.masks.topk import MatrixPicker, ModelPicker
from qrosa.planner.hardware import Here
from qrosa.planner.request import make_request
from qrosa.planner.search.solve import solve

SAMPLES, PROMPT_TOKENS, DENSITY = 64, 120, 0.0019
PARTS = ("completion", "all", "cost", "planned")
LOSSES = {"completion", "all"}
RESULT = measure.RESULTS / "selection-cpu.json"
LAYERS = (0, 7, 15, 22, 29)
CASES = (
    *(("squared", "matrix", factor) for factor in (4, 8, CANDIDATE_FACTOR, 2 * CANDIDATE_FACTOR)),
    *((score, "matrix", CANDIDATE_FACTOR) for score in ("mean", "repair", "curvature")),
    *((score, "global", CANDIDATE_FACTOR) for score in ("squared", "curvature")),
)
BATCH = 32  # rows of a training step: the default
PLANS = (("Llama-3.1-8B", 8), ("Llama-3.1-8B", 24), ("Llama-3.1-70B", 24))


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    made = {"planned": list(planned())} if "planned" in parts else {}
    if {*parts} - {"planned"}:
        model, tokenizer = load_base(str(smollm2()))
        for loss in LOSSES & {*parts}:
            made[loss] = list(found(model, labelled_reviews(tokenizer, loss, SAMPLES), loss))
        if "cost" in parts:
            made["cost"] = [cost(model, labelled_reviews(tokenizer, "all", 4), arguments.rounds)]
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    kept = [row for row in before if row["part"] not in made]
    rows = kept + [{"part": part} | row for part, rows in made.items() for row in rows]
    measure.report("selection", sorted(rows, key=lambda row: PARTS.index(row["part"])))


def labelled_reviews(tokenizer: Any, loss: str, count: int) -> list[Sample]:
    """Film reviews, cut, each with a sentence that says what it thinks; loss on that or on all."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    made = []
    for text, label in movie_reviews("imdb")[:count]:
        prompt = ids(f"Review: {text}")[:PROMPT_TOKENS]
        answer = ids(f"\nThe review is {'positive' if label else 'negative'}.")
        made.append(Sample(prompt + answer, [-100 if loss == "completion" else token for token in prompt] + answer))
    return made


def found(model: Any, rows: list[Sample], loss: str) -> Iterator[dict[str, Any]]:
    """Streamed masks of every score and scope against the exact ones."""
    layers = {path: layer for path, layer in quantized_linears(model).items() if layer_index(path) in LAYERS}
    sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    counts = {path: round(DENSITY * size) for path, size in sizes.items()}
    base_files = checkpoint_of(model)

    def read_error(path: str) -> Tensor:
        return residual(base_files, path, layers[path].weight)

    kept: dict[tuple[str, str, int], MatrixCandidates] = {}
    for name, scope, factor in CASES:
        if scope == "matrix":
            limits = candidates_of(counts, sizes, factor)
            kept[name, scope, factor] = MatrixCandidates(layers, MASK_SCORES[name], limits, read_error)
        else:
            limit = candidates_of_model(counts, sizes, factor)
            kept[name, scope, factor] = ModelCandidates(layers, MASK_SCORES[name], limit, read_error)
    exact = {square: {path: torch.zeros(layers[path].weight.shape) for path in layers} for square in (True, False)}
    _one_pass(model, layers, rows, exact, list(kept.values()))
    for (name, scope, factor), candidates in kept.items():
        score = MASK_SCORES[name]
        row = _compare(score, scope, counts, exact[score.squares], candidates, read_error)
        print(loss, name, scope, factor, row, flush=True)
        yield {"score": name, "scope": scope, "factor": factor} | row


def _one_pass(
    model: Any,
    layers: dict[str, Any],
    rows: list[Sample],
    exact: dict[bool, dict[str, Tensor]],
    kept: list[MatrixCandidates],
) -> None:
    """Exact sums and all candidates from the same gradients."""
    seen = 0

    def receiver(path: str) -> Receiver:
        adds = [adding_to(sums[path], square) for square, sums in exact.items()]

        def receive(dy: Tensor, x: Tensor) -> None:
            for add in adds:
                add(dy, x)
            for candidates in kept:
                (candidates.look if seen < DENSE_SAMPLES else candidates.add)(path, dy, x)

        return receive

    def done(count: int) -> None:
        nonlocal seen
        seen = count
        for candidates in kept if count <= DENSE_SAMPLES else []:
            candidates.end_sample()

    with observe(layers, {path: receiver(path) for path in layers}) as anchor:
        run_backward(model, rows, anchor, done=done)


def _compare(
    score: MaskScore,
    scope: str,
    counts: dict[str, int],
    exact: dict[str, Tensor],
    candidates: MatrixCandidates,
    read_error: Callable[[str], Tensor],
) -> dict[str, float]:
    """Overlap with the exact mask, and share of its score."""
    assert score.rank is not None
    total = sum(counts.values())
    right, streamed = (MatrixPicker(counts) if scope == "matrix" else ModelPicker(list(counts), total) for _ in "ab")
    for path, sums in exact.items():
        right.add(path, score.rank(sums, read_error(path) if score.reads_error else None))
        delta = candidates.take(path)
        error = read_error(path).view(-1)[delta.positions()] if score.reads_error else None
        if delta.nnz:
            streamed.add(path, score.rank(delta.values, error), delta.positions())
    one, other, both, held, whole = right.result(), streamed.result(), 0, 0.0, 0.0
    for path, sums in exact.items():
        scores = score.rank(sums, read_error(path) if score.reads_error else None).view(-1)
        both += int(torch.isin(other[path], one[path]).sum())
        held += float(scores[other[path]].sum(dtype=torch.float64))
        whole += float(scores[one[path]].sum(dtype=torch.float64))
    return {"overlap": both / total, "mass": held / whole}


def cost(model: Any, rows: list[Sample], rounds: int) -> dict[str, Any]:
    """Seconds a row, and how many training steps' time the selection of 64 rows takes."""
    layers = quantized_linears(model)
    sizes = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    nnz = {path: round(DENSITY * size) for path, size in sizes.items()}
    inject_low_rank(model, dict.fromkeys(layers, 8))
    set_masks(model, choose_positions(model, (), config=MaskConfig(mask_score="random"), nnz=nnz, seed=1), init="zero")
    limits = candidates_of(nnz, sizes, CANDIDATE_FACTOR)
    candidates = MatrixCandidates(layers, MASK_SCORES["squared"], limits, lambda path: torch.empty(0))
    sums = {path: torch.zeros(layer.weight.shape) for path, layer in layers.items()}

    def streaming(take_in: Callable[[str, Tensor, Tensor], None]) -> None:
        receivers: dict[str, Receiver] = {path: lambda dy, x, p=path: take_in(p, dy, x) for path in layers}
        with observe(layers, receivers) as anchor:
            run_backward(model, rows, anchor)

    def training() -> None:
        ids = torch.tensor([row.input_ids[:PROMPT_TOKENS] for row in rows])
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    streaming(candidates.look)
    jobs: dict[str, Callable[[], None]] = {
        "training": training,
        "alone": lambda: [sample_loss(model, row).backward() for row in rows] and model.zero_grad(),
        "exact": lambda: accumulate(model, layers, sums, rows, True),
        "look": lambda: streaming(candidates.look),
        "add": lambda: streaming(candidates.add),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):  # the first round warms up
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if number:
                taken[name].append((time.perf_counter() - started) / len(rows))
    median = {name: statistics.median(values) for name, values in taken.items()}
    step = BATCH * median["training"]
    streamed = DENSE_SAMPLES * median["look"] + (SAMPLES - DENSE_SAMPLES) * median["add"]
    return {
        "seconds_a_row": median,
        "batch": BATCH,
        "samples": SAMPLES,
        "streamed_over_step": streamed / step,
        "exact_pass_over_step": SAMPLES * median["exact"] / step,
    }


def planned() -> Iterator[dict[str, Any]]:
    """Passes for large models on small cards."""
    for name, gib in PLANS:
        shape = from_config(name, (MODELS | LARGE)[name].config)
        for scope in ("matrix", "global"):
            row: dict[str, Any] = {"model": name, "vram": gib * 2**30, "scope": scope}
            for selection in ("exact", None):
                settings = {"budget": "0.3%", "mask_scope": scope} | (
                    {"mask_selection": selection} if selection else {}
                )
                request = make_request(
                    shape, make_groups(settings), Here(card=None, host=128 * 2**30), vram=row["vram"]
                )
                plan = solve(request)
                row["passes" if selection is None else "exact_passes"] = plan.mask_passes
            row |= {
                "candidates": plan.work.mask_candidates,
                "statistics": plan.phases["select"].device["mask_statistics"],
            }
            yield row


if __name__ == "__main__":
    main()
