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
PACKED = {"packed": True, "rows": 3}
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
    ("Llama-3.1-8B", 2048, RECOMPUTE | PACKED),
    ("Llama-3.1-8B", 512, KEEP | PACKED),
    ("Mistral-7B", 8192, RECOMPUTE | PACKED),
    ("Gemma-2-9B", 2048, RECOMPUTE | PACKED),
    ("Phi-3-medium", 512, KEEP | PACKED),
]
# Steps that score answers first; what picks masks is the same as ever, and not run again here.
COMPARED = {"dropout": 0.0, "mask_score": "random"}
PAIRS = [
    ("dpo", "Llama-3.1-8B", 2048, RECOMPUTE),
    ("dpo", "Llama-3.1-8B", 4096, OFFLOAD | {"resident_blocks": 0}),
    ("dpo", "Mistral-7B", 512, KEEP | {"rows": 2}),
    ("dpo", "Mistral-Nemo-12B", 2048, STREAM),
    ("dpo", "Qwen2.5-7B", 4096, OFFLOAD),
    ("dpo", "Qwen3-8B", 2048, RECOMPUTE | {"rows": 2}),
    ("dpo", "Gemma-2-9B", 512, KEEP),
    ("dpo", "Phi-3-medium", 512, RECOMPUTE | {"rows": 2}),
    ("orpo", "Llama-3.1-8B", 2048, RECOMPUTE | {"rows": 2}),
    ("orpo", "Qwen2.5-14B", 512, KEEP),
    ("kto", "Llama-3.1-8B", 2048, STREAM),
    ("kto", "Qwen3-8B", 512, RECOMPUTE | {"rows": 2}),
]


def check(work: Workload, config: Any, expected: set[str] | None = None) -> None:
    planned, simulated = phases(work), simulate_model(config, work).phases
    assert set(simulated) == (expected or {"select", "train", "eval"})
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


@pytest.mark.parametrize(
    ("objective", "name", "length", "changes"), PAIRS, ids=lambda value: str(value).replace("'", "")
)
def test_steps_that_compare_answers(
    monkeypatch: pytest.MonkeyPatch, objective: str, name: str, length: int, changes: dict[str, Any]
) -> None:
    three = RealModel(MODELS[name].billions, MODELS[name].config | {"num_hidden_layers": 3})
    monkeypatch.setitem(memory_cases.MODELS, name, three)
    work = workload(name, length, objective=objective, **COMPARED, **changes)
    check(work, model_config(name), {"train", "eval"})


@pytest.mark.parametrize(("name", "length"), [("Gemma-2-9B", 256), ("Llama-3.1-8B", 1024)])
def test_scoring_with_few_logits_at_once(monkeypatch: pytest.MonkeyPatch, name: str, length: int) -> None:
    """Two layers whose boundaries wait on the host: the logits that score answers may be all there is (Gemma-2's are
    the peak), and as few of them exist at once as in the loss."""
    two = RealModel(1.0, MODELS[name].config | {"num_hidden_layers": 2})
    monkeypatch.setitem(memory_cases.MODELS, name, two)
    work = workload(name, length, objective="dpo", eval_tokens=length, loss_chunk_tokens=64, **COMPARED, **OFFLOAD)
    check(work, model_config(name), {"train", "eval"})


@pytest.mark.parametrize("changes", [RECOMPUTE, KEEP])
def test_packed_rows_under_a_window(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    sliding = MODELS["Mistral-7B"].config | {"num_hidden_layers": 3, "sliding_window": 1024}
    monkeypatch.setitem(memory_cases.MODELS, "Mistral-7B", RealModel(7.2, sliding))
    check(workload("Mistral-7B", 2048, **(changes | PACKED)), model_config("Mistral-7B"))


def test_a_whole_8b_model() -> None:
    check(workload("Llama-3.1-8B", 1024, checkpointing=True), model_config("Llama-3.1-8B"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_cpu(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setitem(memory_cases.MODELS, "SmolLM2", RealModel(0.1345, SMOLLM2))
    work = workload("SmolLM2", 512, rows=4, checkpointing=True, device="cpu", attention="eager", eval_tokens=1024)
    work = replace(work, packed=packed)
    check(replace(work, mask_group_bytes=2**27), model_config("SmolLM2"))


def test_answers_are_compared_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    four = RealModel(0.1, SMOLLM2 | {"num_hidden_layers": 4})
    monkeypatch.setitem(memory_cases.MODELS, "SmolLM2", four)
    settings = COMPARED | {"objective": "dpo", "device": "cpu", "attention": "eager", "eval_tokens": 1024}
    check(workload("SmolLM2", 256, rows=2, checkpointing=True, **settings), model_config("SmolLM2"), {"train", "eval"})


def test_what_is_no_tensor_is_not_compared() -> None:
    memory = phases(workload("Mistral-7B", 2048, checkpointing=True))["train"]
    assert memory.tensor_total == memory.device_total - sum(memory.device.get(name, 0) for name in OVERHEAD)
