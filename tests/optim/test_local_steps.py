"""Machines that step on their own, as threads of one process: a meeting leaves them alike, at the mean."""

import threading
from types import SimpleNamespace

import pytest
import torch

from qrosa.errors import InputError
from qrosa.optim.adamw import AdapterOptimizer
from qrosa.optim.local_steps import LocalStepsOptimizer, left_out
from qrosa.optim.machines import Machines


class Room:
    """What stands for the network: machines put something down, wait for all, and look."""

    num_processes = 1  # of a machine

    def __init__(self, index, table, barrier):
        self.index, self.table, self.barrier = index, table, barrier

    def _all(self, mine):
        self.table[self.index] = mine
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def reduce(self, tensor):
        return tensor

    def gather(self, numbers):
        return self._all(numbers)

    def total(self, tensor):
        return sum(self._all(tensor.clone()))


def parameters():
    return [torch.nn.Parameter(torch.linspace(-1, 1, 30).bfloat16()), torch.nn.Parameter(torch.zeros(5).bfloat16())]


def together(work, machines=2):
    """``work(room)`` of each machine, all at once; their results."""
    table, barrier, results = [None] * machines, threading.Barrier(machines, timeout=20), [None] * machines

    def run(index):
        results[index] = work(Room(index, table, barrier))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def step(optimizer, seed):
    for parameter in (p for part in optimizer.parts.values() for p in part.parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)
    optimizer.accumulate()
    optimizer.update(lr=1e-2, sparse_lr=1e-2, max_norm=1.0)


def make(room, **options):
    return LocalStepsOptimizer(parameters(), machines=room, **{"outer_lr": 1.0, "outer_momentum": 0.0, **options})


def test_machines_come_out_of_a_meeting_alike_at_the_weighted_mean():
    def work(room):
        optimizer = make(room)
        start = optimizer.groups["low_rank"].master.detach().clone()
        for index in range(4):
            step(optimizer, seed=10 * room.index + index)
        apart = optimizer.groups["low_rank"].master.detach().clone()
        weights = optimizer.meet()["low_rank"]
        group = optimizer.groups["low_rank"]
        assert not group.gradient.any()  # what the moves were laid out in is clean for the next step
        torch.testing.assert_close(torch.cat([p.flatten() for p in group.parameters]), group.master.bfloat16())
        return start, apart, weights, group.master.detach().clone()

    (start, first, weights, ends), (_, second, _, other) = together(work)
    assert torch.equal(ends, other) and not torch.equal(first, second)
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(ends, start + weights[0] * (first - start) + weights[1] * (second - start))


def test_a_machine_with_what_is_not_finite_is_brought_back_by_the_others():
    def work(room):
        optimizer = make(room)
        step(optimizer, seed=room.index)
        if room.index == 1:
            optimizer.groups["low_rank"].master.detach()[3] = float("nan")
        return optimizer.meet(), optimizer.groups["low_rank"].master.detach().clone()

    (weights, first), (_, second) = together(work)
    assert weights == {"low_rank": [1.0, 0.0]}
    assert torch.equal(first, second) and torch.isfinite(first).all()
    assert left_out(weights, 20) == [
        "after step 20 the low-rank part of machine 2 moved unusually far and was left out"
    ]


def test_where_nothing_counts_all_go_back():
    def work(room):
        optimizer = make(room)
        start = optimizer.groups["low_rank"].master.detach().clone()
        optimizer.groups["low_rank"].master.detach().fill_(float("inf"))
        weights = optimizer.meet()
        return weights, torch.equal(optimizer.groups["low_rank"].master, start)

    for weights, back in together(work):
        assert weights == {"low_rank": [0.0, 0.0]} and back
        assert "all go back to the last meeting" in left_out(weights, 5)[0]


def test_one_machine_that_takes_its_moves_whole_is_the_plain_optimizer():
    def work(room):
        optimizer = make(room)
        plain = AdapterOptimizer(parameters())
        for index in range(6):
            step(optimizer, index)
            step(plain, index)
            if index % 2:
                optimizer.meet()
        return optimizer.groups["low_rank"].master.detach(), plain.groups["low_rank"].master.detach()

    ((ours, theirs),) = together(work, machines=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # common + move rounds once more


def test_a_restored_machine_goes_on_to_the_same_bits():
    def work(room):
        def go(optimizer, seeds):
            for index in seeds:
                step(optimizer, seed=10 * room.index + index)
            optimizer.meet()

        optimizer = make(room, outer_lr=0.8, outer_momentum=0.85)
        optimizer.add_sparse([torch.nn.Parameter(torch.ones(7))])
        go(optimizer, range(3))
        saved = optimizer.state_tensors()
        go(optimizer, range(3, 6))
        again = make(room, outer_lr=0.8, outer_momentum=0.85)
        again.add_sparse([torch.nn.Parameter(torch.ones(7))])
        again.load_state_tensors(saved)
        go(again, range(3, 6))
        return optimizer.state_tensors(), again.state_tensors()

    for whole, again in together(work):
        assert whole.keys() == again.keys() and "outer.sparse.velocity" in whole
        assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("told", "index", "leads"), [([2, 2, 2, 2], 3, False), ([2, 2, 2, 2], 2, True)])
def test_a_process_knows_its_machine(told, index, leads, monkeypatch):
    monkeypatch.setattr(torch.distributed, "new_subgroups", lambda size: (object(), []))
    machines = Machines(accelerator(told, index), 2)
    assert (machines.count, machines.index, machines.leads, list(machines.own)) == (2, 1, leads, [2, 3])


def test_machines_of_different_sizes_are_refused():
    with pytest.raises(InputError, match="as many processes on each machine"):
        Machines(accelerator([2, 2, 1], 0), 2)


def accelerator(told, index):
    """A stand-in for as many processes, which say how many share their machine."""
    rows = torch.tensor([[float(count)] for count in told], dtype=torch.float64)
    return SimpleNamespace(
        num_processes=len(told), process_index=index, device=torch.device("cpu"), gather=lambda row: rows
    )
