"""A stand-in card for each test that asks for one, and the machinery around it in a fresh state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (looks for CUDA as it is imported, and has to look before a stand-in is there)
import pytest
import torch
import transformers  # noqa: F401

from qrosa.config import make_run_config
from tests.card.standin.cuda import install
from tests.card.standin.device import StandIn


@pytest.fixture
def make_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """``make_card(total=8 * GB, others=0)``: the card that torch sees from here to the end of the test."""
    from accelerate.state import AcceleratorState, PartialState

    made: list[StandIn] = []
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory

    def make(total: int = 8 << 30, others: int = 0) -> StandIn:
        card = StandIn(total, others)
        install(card, monkeypatch)
        card.__enter__()
        made.append(card)
        return card

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed looks once a process, and must not find the stand-in
    yield make
    for card in made:
        card.__exit__(None, None, None)
    torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    for card in made:
        assert not card.memory.faults, card.memory.faults


@pytest.fixture
def card(make_card: Callable[..., StandIn]) -> StandIn:
    """A stand-in card with 8 GiB that nothing else uses."""
    return make_card()


@pytest.fixture
def any_card(request: pytest.FixtureRequest) -> None:
    """The card that is here, else a stand-in."""
    if not torch.cuda.is_available():
        request.getfixturevalue("card")


@pytest.fixture
def settings(tiny_model_dir: Callable[..., Path], tiny_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``settings(offload="base")``: the config of a run of four steps."""
    rows = str(tiny_rows(count=12))

    def make(**values: Any) -> Any:
        defaults = {
            "model": str(tiny_model_dir()),
            "data": rows,
            "output": str(tmp_path / "run"),
            "budget": "4%",
            "batch_size": 4,
            "max_steps": 4,
            "warmup_steps": 2,
            "mask_samples": 4,
            "vram": "4GB",
        }
        return make_run_config(defaults | values)

    return make
