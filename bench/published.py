"""What others have published of QLoRA runs, and what the plan says of the same settings (the table in docs/results.md).

The settings are those of the source as far as it gives them. Peaks of other tools are of their allocator, so they stand
beside the plan's tensors without context and slack. Nothing here was run: the right-hand side is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.real_models import MODELS, SMOLLM2
from qrosa.base.shape import from_config
from qrosa.config import make_groups
from qrosa.planner.cards import Machines, find_card
from qrosa.planner.hardware import Here
from qrosa.planner.plan import Plan
from qrosa.planner.request import make_request
from qrosa.planner.search.solve import solve
from qrosa.planner.search.whatif import longest_row

GIB = 2**30
LOW_RANK: dict[str, Any] = {"sparse_share": 0.0, "density": 0.0, "dropout": 0.0}


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        source: Who says so.
        setting: In words.
        model: Of Meta, by name.
        card: As ``--gpu`` names it.
        settings: Flat settings of the plan.
        kind: ``peak`` in GiB, ``speed`` in tokens a second, or ``longest`` in tokens of a row.
        value: The figure.
    """

    source: str
    setting: str
    model: str
    card: str
    settings: dict[str, Any]
    kind: str
    value: float


# Its positions are taken to be stretched, as a run on rows of 32k tokens has to.
_LLAMA_2 = SMOLLM2 | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
_CONFIGS = {"Llama-2-7B": _LLAMA_2, "Llama-3.1-8B": MODELS["Llama-3.1-8B"].config}
_TORCHTUNE = {"rank": 8, "seq_len": 2048, "micro_batch": "2", "batch_size": 2, "checkpointing": "on", "offload": "none"}
_UNSLOTH = {"rank": 32, "micro_batch": "1", "batch_size": 1, "checkpointing": "on", "offload": "activations"}
_ROWS = {"rank": 8, "micro_batch": "1", "batch_size": 1, "checkpointing": "on", "offload": "none"}


def _unsloth(memory: int, tokens: int) -> Published:
    words = f"r32, one row, activations on the host, {memory} GB"
    source = "Unsloth README before 2026-03-17"
    return Published(source, words, "Llama-3.1-8B", "rtx4090", {**_UNSLOTH, "vram": f"{memory}GB"}, "longest", tokens)


def _factory(length: int, rate: float) -> Published:
    settings = {**_ROWS, "seq_len": length}
    return Published("LLaMA-Factory wiki", f"r8, 1 x {length:,}, A100", "Llama-2-7B", "a100", settings, "speed", rate)


PUBLISHED = (
    Published("torchtune README", "r8, 2 x 2,048, RTX 4090", "Llama-3.1-8B", "rtx4090", _TORCHTUNE, "peak", 7.4),
    Published("torchtune README", "r8, 2 x 2,048, RTX 4090", "Llama-3.1-8B", "rtx4090", _TORCHTUNE, "speed", 2413),
    _factory(2048, 3178),
    _factory(8192, 3632),
    _factory(32768, 2456),
    _unsloth(8, 2972),
    _unsloth(12, 21_848),
    _unsloth(16, 40_724),
    _unsloth(24, 78_475),
)


def planned(row: Published) -> float:
    """The plan's figure for a row's settings."""
    groups = make_groups(LOW_RANK | row.settings)
    shape = from_config(f"meta-llama/{row.model}", _CONFIGS[row.model])
    plan = solve(make_request(shape, groups, Here(card=None, host=0), machines=Machines(find_card(row.card))))
    return {"peak": _tensors, "speed": _speed, "longest": _longest}[row.kind](plan)


def _tensors(plan: Plan) -> float:
    return plan.phases["train"].tensor_total / GIB


def _speed(plan: Plan) -> float:
    estimated = plan.estimate()
    assert estimated is not None
    return estimated.tokens_per_second


def _longest(plan: Plan) -> float:
    return float(longest_row(plan.request, plan.allocation) or 0)
