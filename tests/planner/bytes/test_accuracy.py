"""The plan's closed form against the simulation of a step: within 2%, and never under by more than 1%.

The whole grid is ``bench/bench_plan.py``; here are the real shapes cut to three layers, where every formula shows more
than in a whole model (the base hides less), and one whole 8B model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench import real_models as memory_cases
from bench.bench_plan import model_config, workload
from bench.real_models import MODELS, SMOLLM2, RealModel
from qrosa.measure.simulate import simulate_model
from qrosa.planner.bytes.peaks import OVERHEAD
from qrosa.planner.bytes.phases import phases
from qrosa.planner.workload import Workload

RECOMPUTE, KEEP = {"checkpointing": True}, {"checkpointing": False}
OFFLOAD = {"checkpointing": True, "offload_activations": True}
STREAM = {"checkpointing": True, "resident_blocks": 1}
CANDIDATES = {"mask_candidates": 16}
CASES = [
    ("Llama-3.1-8B", 2048, RECOMPUTE),
    ("Llama-3.1-8B", 512, OFFLOAD),
    ("Llama-3.1-8B", 2048, STREAM),
    ("Llama-3.1-8B", 2048, RECOMPUTE | CANDIDATES),
    ("Qwen3-8B", 512, KEEP | CANDIDATES | {"mask_scope": "global", "mask_score": "curvature"}),
    ("Mistral-7B", 8192, KEEP),
    ("Mistral-7B", 512, RECOMPUTE | {"rows": 4}),
    ("Mistral-Nemo-12B", 2048, RECOMPUTE),
    ("Qwen2.5-7B", 512, KEEP | {"rows": 4}),
    ("Qwen2.5-14B", 8192, RECOMPUTE),
    ("Qwen3-8B", 2048, KEEP),
    ("Gemma-2-9B", 2048, RECOMPUTE),
    ("Gemma-2-9B", 8192, KEEP),
    ("Phi-3-medium", 512, RECOMPUTE),
    ("Phi-3-medium", 2048, KEEP),
]


def check(work: Workload, config: Any) -> None:
    planned, simulated = phases(work), simulate_model(config, work).phases
    assert set(simulated) == {"select", "train", "eval"}
    for phase, peak in simulated.items():
        apart = planned[phase].tensor_total / peak.total - 1
        assert -0.01 <= apart <= 0.02, f"{phase}: {apart:+.2%}, planned {planned[phase]}, simulated {peak.components}"


@pytest.mark.parametrize(("name", "length", "changes"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_three_layers_of_real_shapes(
    monkeypatch: pytest.MonkeyPatch, name: str, length: int, changes: dict[str, Any]
) -> None:
    three = RealModel(MODELS[name].billions, MODELS[name].config | {"num_hidden_layers": 3})
    monkeypatch.setitem(memory_cases.MODELS, name, three)
    check(workload(name, length, **changes), model_config(name))


def test_a_whole_8b_model() -> None:
    check(workload("Llama-3.1-8B", 1024, checkpointing=True), model_config("Llama-3.1-8B"))


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory_cases.MODELS, "SmolLM2", RealModel(0.1345, SMOLLM2))
    work = workload("SmolLM2", 512, rows=4, checkpointing=True, device="cpu", attention="eager", eval_tokens=1024)
    check(replace(work, mask_group_bytes=2**27), model_config("SmolLM2"))


def test_what_is_no_tensor_is_not_compared() -> None:
    memory = phases(workload("Mistral-7B", 2048, checkpointing=True))["train"]
    assert memory.tensor_total == memory.device_total - sum(memory.device.get(name, 0) for name in OVERHEAD)
