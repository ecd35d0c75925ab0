"""Tables of measured figures in the documentation, made from ``bench/results/*.json``: ``python bench/tables.py``.

A document marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between them is
written here and nowhere else. ``--check`` changes nothing and fails when a table is out of date, which a test does too.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.accuracy import show as accuracy_tables
from bench.accuracy.run import RESULTS as RESULTS_OF_ACCURACY
from bench.accuracy.table import Table
from bench.published import PUBLISHED
from bench.published import planned as published_plan
from bench.real_models import LARGE, MODELS
from qrosa.base.shape import from_config
from qrosa.cli.plan import show
from qrosa.config import make_groups
from qrosa.planner.cards import Machines, find_card
from qrosa.planner.hardware import Here
from qrosa.planner.plan import Plan
from qrosa.planner.request import make_request
from qrosa.planner.search.solve import solve
from qrosa.planner.search.whatif import longest_row
from qrosa.quantities import bytes_text

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_PLACE = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(["---"] + ["---:"] * (len(headings) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def read(name: str) -> dict[str, Any]:
    """One result file."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def place_of(*names: str) -> str:
    """Where and when the figures of result files were taken."""
    found = [read(name) for name in names]
    first = found[0]
    days = sorted({record["date"] for record in found})
    return (
        f"\n{first['device']}, {first['threads']} threads, {first['isa']}, torch {first['torch']}, "
        f"{' and '.join(days)}; load of the machine before each run: "
        f"{', '.join('not noted' if record['load'] is None else format(record['load'], '.1f') for record in found)}.\n"
    )


def cpu_ops() -> str:
    """Each op against what it replaces."""
    rows = []
    for row in read("dequant_add-cpu")["rows"]:
        ratio = f"{row['delta_over_bnb']:.2f}"
        rows.append([f"`dequant_add` with 0.6% delta, {row['shape']}", "bitsandbytes dequantise alone", ratio])
    for row in read("sddmm-cpu")["rows"]:
        what = f"`sddmm` {row['density']:.1%}, {row['shape']}, T = {row['tokens']}"
        rows.append([what, "dense dW, then gather", f"{row['sddmm_over_dense']:.2f}"])
    for row in read("dequant_spmm-cpu")["rows"]:
        what = f"`dequant_spmm`, {row['shape']}, T = {row['tokens']}"
        rows.append([what, "dequantise, then multiply", f"{row['spmm_over_two_step']:.2f}"])
    names = ("dequant_add-cpu", "sddmm-cpu", "dequant_spmm-cpu")
    return markdown(["op", "against", "time, as a ratio"], rows) + place_of(*names)


def cpu_layer() -> str:
    """Forward and backward of a whole layer."""
    rows = [
        [
            f"{row['shape']}, T = {row['tokens']}",
            f"{row['dense_ms']:.1f} ms",
            f"{row['plain_over_dense']:.2f}",
            f"{row['sparse_over_dense']:.2f}",
            f"{row['sparse_over_plain']:.3f}",
        ]
        for row in read("linear-cpu")["rows"]
    ]
    headings = [
        "layer",
        "dense bf16, forward + dX",
        "rank 16 / dense",
        "rank 16 + 0.6% / dense",
        "with / without sparse",
    ]
    return markdown(headings, rows) + place_of("linear-cpu")


def training(record: str = "training-cpu") -> str:
    """Whole steps and generation of a real model against the peer."""
    rows = [
        [
            row["work"],
            f"{row['peft_tokens_per_s']:.0f}",
            f"{row['low_rank_tokens_per_s']:.0f}",
            f"{row['sparse_tokens_per_s']:.0f}",
            f"{row['low_rank_over_peft']:.2f} x",
            f"{row['sparse_step_over_low_rank_step']:.3f}",
        ]
        for row in read(record)["rows"]
    ]
    headings = [
        "SmolLM2-135M, tokens/s",
        "PEFT + bitsandbytes",
        "qrosa, rank 16",
        "qrosa, rank 16 + 0.6%",
        "speed-up",
        "step with / without sparse",
    ]
    return markdown(headings, rows) + place_of(record)


def training_without_tiles() -> str:
    """The same with every library held to AVX-512."""
    return training("training-without-tiles-cpu")


def training_avx2() -> str:
    """The same on a processor without AVX-512."""
    return training("training-avx2-cpu")


def sharing() -> str:
    """Training beside busy processes."""
    rows = [
        [str(row["others"]), f"{row['tokens_per_s']:.0f}", f"{row['of_alone']:.2f}", f"{row['fair']:.2f}"]
        for row in read("sharing-cpu")["rows"]
    ]
    headings = ["busy processes beside it, two cores", "tokens/s", "of the speed alone", "fair share"]
    return markdown(headings, rows) + place_of("sharing-cpu")


def repair() -> str:
    """What a repaired 4-bit base wins back before any training."""
    record = read("repair")
    rows = []
    for row in record["results"]:
        if row["kind"] == "sparse":
            what = f"{row['density']:.2%} sparse, {row['score']}, per {row['scope']}".replace(
                "per global", "whole model"
            )
        else:
            what = " ".join(str(row[key]) for key in ("kind", "score", "rank", "density") if row.get(key) is not None)
        rows.append([what, bytes_text(row["bytes"]), f"{row['perplexity']:.2f}", f"{row['won_back']:.0%}"])
    low, high = record["perplexity"]["bf16"], record["perplexity"]["nf4"]
    text = f"\n{record['model']}, {record['text']}; {record['evaluation_tokens']:,} tokens. "
    text += f"Perplexity in bf16 {low:.2f}, in NF4 {high:.2f}. \n".replace(" \n", "\n")
    return markdown(["start of the sparse part", "size", "perplexity", "share of the loss won back"], rows) + text


def quantize() -> str:
    """What better 4-bit bases and their repairs win back, domain by domain."""
    record = read("quantize-cpu")
    domains = list(record["tokens"])
    rows = []
    for row in record["rows"]:
        won = [
            "0%" if row["recipe"] == "nearest" else f"{100 * found['share']:.0f} ± {100 * found['error']:.0f}%"
            for found in (row["won_back"][domain] for domain in domains)
        ]
        rows.append([row["recipe"], *won, *(f"{row['perplexity'][domain]:.2f}" for domain in domains)])
    headings = ["4-bit form", *domains, *(f"perplexity, {domain}" for domain in domains)]
    sixteen = ", ".join(f"{domain} {value:.2f}" for domain, value in record["perplexity_16_bit"].items())
    text = f"\n{record['model']}; {min(record['tokens'].values()):,} held-out tokens of each domain, standard errors; "
    text += f"{record['calibration_windows']} calibration windows of {record['window']}. In 16 bits: {sixteen}.\n"
    return markdown(headings, rows) + text


def recipes() -> str:
    """What ``qrosa plan`` says of every recipe, from the comments that a test holds to it."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        planned = re.search(r"# Planned peak: (.+?) of (.+?) on (?:a card|the CPU)(?:, with (.+?) of host)?", text)
        if planned is None:
            continue
        settings = dict(re.findall(r"^([a-z-]+): (.+)$", text, re.MULTILINE))
        rows.append(
            [
                f"[{path.stem}](../configs/{path.name})",
                settings.get("seq-len", "2048"),
                settings.get("budget", ""),
                planned[1],
                planned[2],
                planned[3] or "",
            ]
        )
    return markdown(["recipe", "seq-len", "budget", "planned peak", "cap", "host memory"], rows)


def plan() -> str:
    """The worst differences of planned from simulated bytes, by model."""
    lines = (RESULTS / "plan.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| model |")))
    table = lines[start : start + lines[start:].index("")]
    counted = next(line for line in lines if "comparisons" in line)
    return "\n".join(table) + "\n\n" + counted + "\n"


def host_memory(record: str = "host-memory-cpu") -> str:
    """Planned against resident memory of runs on the CPU: the highest phase by setting, and the span of every phase."""
    found = read(record)["rows"]
    rows = []
    for name in dict.fromkeys(row["setting"] for row in found):
        phases = [row for row in found if row["setting"] == name]
        highest = max(phases, key=lambda row: row["planned"])
        apart = [row["percent"] for row in phases]
        sizes = (f"{highest[key] / 2**20:,.0f}" for key in ("planned", "measured"))
        use = "fitted" if highest["fitted"] else "tested"
        rows.append([name, highest["phase"], *sizes, f"{min(apart):+.1f}% to {max(apart):+.1f}%", use])
    spans = []
    for phase in dict.fromkeys(row["phase"] for row in found):
        apart = [row["percent"] for row in found if row["phase"] == phase]
        spans.append(f"{phase} {min(apart):+.1f}% to {max(apart):+.1f}%")
    text = (
        f"\nSmolLM2-135M where no other model is named. By phase: {', '.join(spans)}. "
        "Reproduce: `python bench/bench_host_memory.py`\n"
    )
    headings = ["setting", "highest phase", "planned MiB", "measured MiB", "all phases: plan over measured", "settings"]
    return markdown(headings, rows) + text


def host_memory_avx2() -> str:
    """The same on a processor without AVX-512."""
    return host_memory("host-memory-avx2-cpu")


def rank_by() -> str:
    """Held-out accuracy and loss by how ranks were given out, a row a seed and sparse share."""
    found = read("rank-by-cpu")["rows"]
    cases = dict.fromkeys((row["sparse_share"], row["seed"]) for row in sorted(found, key=lambda r: r["sparse_share"]))
    rows = []
    for share, seed in cases:
        by = {r["rank_by"]: r for r in found if (r["sparse_share"], r["seed"]) == (share, seed)}
        cells = [f"{by[o]['accuracy']:.3f} / {by[o]['loss']:.3f}" for o in ("order", "sensitivity")]
        rows.append([f"{share:g}", str(seed), *cells])
    first = found[0]
    text = (
        f"\nSmolLM2-135M, film reviews, budget 0.3%, {first['train_rows']} training rows, {first['steps']} steps, "
        f"{first['test_rows']} held-out rows: accuracy / loss. Reproduce: `python bench/bench_rank_by.py`\n"
    )
    return markdown(["sparse share", "seed", "--rank-by order", "--rank-by sensitivity"], rows) + text


def far_apart() -> str:
    """Steps of machines on their own, against gradients that are summed in every one."""
    record = read("far-apart-cpu")
    cases: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in sorted(record["rows"], key=lambda row: (row["machines"], row["every"], row["more"])):
        cases.setdefault((row["machines"], row["every"], row["more"]), []).append(row)
    rows = []
    for (machines, every, more), found in cases.items():
        losses, plain = [row["loss"] for row in found], cases[machines, 1, ""]
        spread = f" ({min(losses):.3f} to {max(losses):.3f}, {len(losses)} seeds)" if len(losses) > 1 else " (one seed)"
        sent = sum(row["bytes"] for row in found) / len(found)
        share = sent / (sum(row["bytes"] for row in plain) / len(plain))
        seconds = sum(row["seconds"] for row in found) / len(found)
        how = "every step" if every == 1 else f"`{f'--sync-every {every} {more}'.strip()}`"
        what = f"{machines} machines, {how}"
        loss = f"{sum(losses) / len(losses):.3f}{spread}"
        rows.append([what, loss, f"{sent / 1e6:.1f} MB", f"{share:.1%}", f"{seconds:.0f} s"])
    text = (
        f"\nFirst {record['layers']} layers of SmolLM2-135M, {record['rows'][0]['steps']} steps of 8 rows, "
        f"{record['test_rows']} held-out rows; {record['mbit']:.0f} Mbit/s and {record['round_trip_ms']:.0f} ms "
        "for each machine; all machines are processes on two cores, which other work shared, so seconds say little. "
    )
    lost = record.get("lost")
    if lost:
        same = "the same bits as without that" if lost["same_adapter"] else "another adapter than without that"
        text += (
            f"One of two machines killed after step {lost['killed_after']}: the other ended "
            f"{lost['noticed_after_seconds']:.1f} s later, and both, started again, ended with {same}. "
        )
    headings = ["", "held-out loss", "sent by a machine", "of every step's", "steps and meetings"]
    return markdown(headings, rows) + text + "Reproduce: `python bench/bench_far_apart.py`\n"


# What the first table of the README asks: models as their config.json says, cards with the memory that people own.
_FIT_MODELS = (
    *(("Llama-3.1-8B", "sft"), ("Llama-3.1-8B", "dpo"), ("Mistral-Nemo-12B", "sft"), ("Qwen2.5-14B", "sft")),
    *(("Qwen2.5-32B", "sft"), ("Llama-3.1-70B", "sft")),
)
_FIT_CARDS = ("rtx4060", "rtx3060", "rtx4060ti-16gb", "rtx4090")


def planned(name: str, card: str, **settings: Any) -> Plan:
    """The plan of a real model's shape on a card that is not here, in a host whose memory is not asked for."""
    groups = make_groups({"budget": "0.3%"} | settings)
    shape = from_config(f"meta-llama/{name}" if "Llama" in name else name, (MODELS | LARGE)[name].config)
    return solve(make_request(shape, groups, Here(card=None, host=0), machines=Machines(find_card(card))))


def fit() -> str:
    """Which model fits which card: the longest rows with any lever, and the estimated speed at 2048 tokens."""
    rows = []
    for name, objective in _FIT_MODELS:
        cells = []
        for card in _FIT_CARDS:
            plan = planned(name, card, objective=objective)
            longest = longest_row(plan.request, plan.allocation)
            estimated = plan.estimate() if plan.fits else None
            speed = f", {estimated.tokens_per_second:,.0f} tokens/s" if estimated else ""
            cells.append(f"{longest:,}{speed}" if longest else "-")
        rows.append([name if objective == "sft" else f"{name}, `--objective {objective}`", *cells])
    cards = [f"{find_card(name).name}, {find_card(name).memory_gb} GB" for name in _FIT_CARDS]
    return markdown(["longest row, speed at 2048", *cards], rows)


def promises() -> str:
    """The four promises, each with what was measured last."""
    layers = [row["sparse_over_plain"] for row in read("linear-cpu")["rows"]]
    steps = [row["sparse_step_over_low_rank_step"] for row in read("training-cpu")["rows"] if "training" in row["work"]]
    grid = [row["percent"] for row in json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))]
    host = [row["percent"] for name in ("", "-avx2") for row in read(f"host-memory{name}-cpu")["rows"]]
    won = {
        row["recipe"]: [found["share"] for found in row["won_back"].values()] for row in read("quantize-cpu")["rows"]
    }
    forms = (
        ("a base of `qrosa quantize`, in the same bytes,", "tokens weighed"),
        ("with 0.3% sparse values", "tokens weighed + 0.3%"),
        ("and rank 8", "tokens weighed + 0.3% + rank 8"),
    )
    shares = ", ".join(f"{words} {min(won[name]):.0%} to {max(won[name]):.0%}" for words, name in forms)
    rows = [
        [
            "*RoSA at the price of QLoRA*: the sparse part costs at most 3% of a step",
            f"on a CPU a step takes {min(steps):.2f} to {max(steps):.2f} times one without, a layer alone "
            f"{min(layers):.2f} to {max(layers):.2f}: **not met there**; on a card not measured",
        ],
        [
            "*The plan is a promise*: the peak within 3% of the measured one, never more than 1% too small",
            f"closed form against the real step's tensors: {min(grid):+.2f}% to {max(grid):+.2f}%; "
            f"resident memory on a CPU: {min(host):+.1f}% to {max(host):+.1f}%, held to; on a card not measured",
        ],
        [
            "*What you trained is what you export*: streamed, loads in plain transformers, measured drift",
            "met: `qrosa export --verify` prints the drift, `make demo` scores the folder without qrosa",
        ],
        [
            "*A 4-bit base that starts nearly as good as the 16-bit one*",
            f"of the log-likelihood that rounding to nearest costs on text that no calibration saw, {shares} win back",
        ],
    ]
    lines = ["| promise | today |", "|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def plan_8b() -> str:
    """What ``qrosa plan`` prints for an 8B model on a 24 GB card, as a terminal session."""
    command = "qrosa plan --model meta-llama/Llama-3.1-8B --budget 0.3% --vram 24GB --gpu rtx4090"
    console = Console(file=io.StringIO(), width=120, highlight=False)
    show(planned("Llama-3.1-8B", "rtx4090", vram="24GB"), console)
    assert isinstance(console.file, io.StringIO)
    lines = [f"$ {command}", *console.file.getvalue().rstrip().splitlines()]
    return "\n" + "\n".join(("    " + line).rstrip() for line in lines) + "\n\n"


def demo() -> str:
    """What ``make demo`` measured when it was recorded."""
    record = read("demo-cpu")
    rows = [
        [row["model"], f"{row['accuracy']:.3f}", "" if row["loss"] is None else f"{row['loss']:.3f}"]
        for row in record["rows"]
    ]
    text = (
        f"\n{record['test_rows']} held-out film reviews, {record['train_rows']} training rows, one seed. "
        "Training memory: "
        f"planned {bytes_text(record['planned'])}, measured {bytes_text(record['measured'])}. "
        f"{record['seconds'] / 60:.0f} minutes in all.\n"
    )
    return markdown(["SmolLM2-135M", "accuracy", "loss"], rows) + text + place_of("demo-cpu")


def selection() -> str:
    """Streamed masks against exact ones, by score and scope, and what selection costs."""
    found = read("selection-cpu")["rows"]
    rows: dict[str, list[str]] = {}
    for row in (row for row in found if row["part"] in ("completion", "all")):
        where = "per matrix" if row["scope"] == "matrix" else "whole model"
        cells = rows.setdefault(f"{row['score']}, {where}, {row['factor']} candidates a position", [])
        cells.append(f"{row['overlap']:.1%} / {row['mass']:.2%}")
    text = "\nShare of positions in common / of the exact mask's score; SmolLM2-135M, 35 matrices, 64 film reviews.\n"
    for row in (row for row in found if row["part"] == "cost"):
        text += (
            f"Selection on {row['samples']} rows takes {row['streamed_over_step']:.1f} times as long as a training "
            f"step of {row['batch']} rows as long; an exact pass {row['exact_pass_over_step']:.1f} times.\n"
        )
    planned = [
        f"{row['model']} in {bytes_text(row['vram'])}, {row['scope']}: {row['passes']} (exact: {row['exact_passes']})"
        for row in found
        if row["part"] == "planned"
    ]
    text += f"Planned passes over the rows at a budget of 0.3%: {'; '.join(planned)}.\n"
    return (
        markdown(
            ["streamed", "loss on completions", "loss on all tokens"], [[name, *cells] for name, cells in rows.items()]
        )
        + text
    )


def published() -> str:
    """What others have published, and the plan for the same settings."""
    words = {"peak": "peak, GiB", "speed": "tokens/s", "longest": "longest row"}
    rows = []
    for row in PUBLISHED:
        value, ours = row.value, published_plan(row)
        shown = [f"{number:,.1f}" if row.kind == "peak" else f"{number:,.0f}" for number in (value, ours)]
        percent = f"{100 * (ours / value - 1):+.0f}%" if ours else "does not fit"
        rows.append([row.source, f"{row.model}, {row.setting}", words[row.kind], *shown, percent])
    return markdown(["source", "setting", "", "published", "qrosa's plan", "off"], rows)


def accuracy(name: str) -> str:
    """A table of the accuracy grid."""
    return accuracy_tables.TABLES[name](accuracy_tables.Grid(Table(RESULTS_OF_ACCURACY)))


TABLES: dict[str, Callable[[], str]] = {
    "cpu-ops": cpu_ops,
    "cpu-layer": cpu_layer,
    "training": training,
    "training-without-tiles": training_without_tiles,
    "training-avx2": training_avx2,
    "sharing": sharing,
    "repair": repair,
    "quantize": quantize,
    "selection": selection,
    "recipes": recipes,
    "plan": plan,
    "host-memory": host_memory,
    "host-memory-avx2": host_memory_avx2,
    "rank-by": rank_by,
    "far-apart": far_apart,
    "fit": fit,
    "published": published,
    "promises": promises,
    "plan-8b": plan_8b,
    "demo": demo,
    **{name: functools.partial(accuracy, name) for name in accuracy_tables.TABLES},
}


def filled(text: str) -> str:
    """A document with its tables as the result files say."""
    return _PLACE.sub(lambda found: found[1] + TABLES[found["name"]]() + found[4], text)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description="Write the measured tables into the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table is out of date")
    check = parser.parse_args().check
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if check and filled(text) != text:
            sys.exit(f"{path.name} is out of date: run python bench/tables.py")
        path.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
