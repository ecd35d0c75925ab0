"""Phases and learning rates."""

import pytest

from qrosa.config import make_run_config
from qrosa.optim.schedule import (
    Phases,
    learning_rate_factor,
    sparse_learning_rate_factor,
    warmup_and_total,
)


def config(**values):
    return make_run_config({"model": "m", "output": "o", "data": "d", "budget": "1%", **values})


@pytest.mark.parametrize(
    ("values", "rows", "expected"),
    [
        ({"max_steps": 100}, 5, Phases(10, 100, True)),
        ({"max_steps": 10_000}, 5, Phases(64, 10_000, True)),
        ({"max_steps": 5}, 5, Phases(0, 5, True)),
        ({"max_steps": 5, "warmup_steps": 3}, 5, Phases(3, 5, True)),
        ({"max_steps": 5, "warmup_steps": 9}, 5, Phases(4, 5, True)),  # the sparse part gets one step at least
        ({"batch_size": 32}, 100, Phases(0, 4, True)),
        ({"batch_size": 32, "epochs": 2.5}, 320, Phases(2, 25, True)),
        ({"batch_size": 32, "epochs": 0.01}, 100, Phases(0, 1, True)),
    ],
)
def test_phases(values, rows, expected):
    assert warmup_and_total(config(**values), rows) == expected


def test_no_warm_up_without_both_parts():
    assert warmup_and_total(config(max_steps=100), 9, sparse=False) == Phases(0, 100, False)
    only_sparse = warmup_and_total(config(max_steps=100), 9, low_rank=False)
    assert only_sparse == Phases(0, 100, True)
    assert only_sparse.phase(0) == "train"


def test_phase_names():
    phases = Phases(2, 5, True)
    assert [phases.phase(step) for step in range(5)] == ["warmup", "warmup", "train", "train", "train"]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_rate_rises_then_falls_and_is_never_zero(kind):
    factors = [learning_rate_factor(step, 100, kind, 0.1) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert min(factors) > 0
    assert factors[-1] == (1.0 if kind == "constant" else pytest.approx(0, abs=0.02))


def test_single_step_runs_at_a_useful_rate():
    assert learning_rate_factor(0, 1, "linear", 0.0) == 1.0
    assert learning_rate_factor(0, 1, "linear", 0.03) == 0.5


def test_the_sparse_rate_rises_from_the_selection_on():
    shared = [learning_rate_factor(step, 100, "linear", 0.05) for step in range(100)]
    sparse = [sparse_learning_rate_factor(step, 100, "linear", 0.05, 20) for step in range(100)]
    assert sparse[20] == pytest.approx(shared[20] / 6)
    assert sparse[24] == pytest.approx(shared[24] * 5 / 6)
    assert sparse[25:] == shared[25:]
    assert [sparse_learning_rate_factor(step, 100, "linear", 0.05, 0) for step in range(100)] == shared
