"""Who counts as busy, and the thread that keeps OpenMP from spinning."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from qrosa.spinning import Sleeper, Used, Watch, short_beside_others, used

STAT = """cpu  700 50 70 9000 10 7 3 0 0 0
cpu0 300 20 30 4000 5 3 1 0 0 0
cpu1 400 30 40 5000 5 4 2 0 0 0
intr 12345
"""


def sleepers() -> int:
    return sum(thread.name == "qrosa-sleeper" for thread in threading.enumerate())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr("qrosa.spinning._threads", lambda: 2)
    made = Watch()
    yield made
    made.end()


def test_only_the_processors_that_may_be_used_count_and_nothing_that_gives_way() -> None:
    assert used(STAT, {0, 1}, 100, 1.5) == Used((300 + 30 + 3 + 1 + 400 + 40 + 4 + 2) / 100, 1.5)
    assert used(STAT, {1}, 100, 0.0).all == pytest.approx(4.46)


@pytest.mark.parametrize(
    ("others", "own", "sleeps"),
    [
        pytest.param(1.0, 1.0, True, id="one other"),
        pytest.param(0.35, 1.5, True, id="a third of a processor"),
        pytest.param(0.2, 1.8, False, id="little"),
        pytest.param(0.0, 2.0, False, id="alone"),
        pytest.param(2.0, 0.1, False, id="this process does not compute"),
    ],
)
def test_threads_sleep_at_once_beside_a_busy_process(watch: Watch, others: float, own: float, sleeps: bool) -> None:
    assert torch
    watch.look(10.0, Used(100.0, 20.0))
    watch.look(12.0, Used(100.0 + 2 * (others + own), 20.0 + 2 * own))
    assert (watch.sleeper is not None, sleepers()) == (sleeps, int(sleeps))


def test_one_thread_waits_for_nobody(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrosa.spinning._threads", lambda: 1)
    watch.look(0.0, Used(0.0, 0.0))
    watch.look(1.0, Used(2.0, 1.0))
    assert watch.sleeper is None


def test_it_ends_when_the_others_have_gone_and_not_before(watch: Watch) -> None:
    total = own = 0.0
    seen = []
    for step, others in enumerate((0.0, 1.0, 0.2, 0.1, 0.2, 1.0)):
        own += 1.0
        total += 1.0 + others
        watch.look(float(step), Used(total, own))
        seen.append(watch.sleeper is not None)
    assert seen == [False, True, True, False, False, True]


def test_a_sleeper_leaves_results_and_thread_count_as_they_are() -> None:
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before, threads = a @ a, torch.get_num_threads()
    sleeper = Sleeper()
    assert torch.equal(a @ a, before)
    assert torch.get_num_threads() == threads
    sleeper.end()
    assert sleepers() == 0


def test_the_watch_ends_with_its_block_after_an_error_too() -> None:
    with pytest.raises(KeyError), short_beside_others():
        assert any(thread.name == "qrosa-spinning" for thread in threading.enumerate())
        raise KeyError
    assert not any(thread.name == "qrosa-spinning" for thread in threading.enumerate())
