"""The table of optimizers: what it says is what each does, and a new entry is all that a new optimizer takes."""

import pytest
import torch
from torch import Tensor, nn

from qrosa.config import TrainConfig, make_group
from qrosa.errors import InputError
from qrosa.optim import kinds
from qrosa.optim.kinds import OPTIMIZERS


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS.values() if not kind.paged], ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [100, 4096, 100_003])
def test_state_bytes_are_those_of_the_states(kind, size):
    master = nn.Parameter(torch.zeros(size))
    optimizer = kind.make(master, 0.0)
    master.grad = torch.ones(size)
    optimizer.step()
    states = [v for key, v in optimizer.state[master].items() if isinstance(v, Tensor) and key != "step"]
    assert kind.state_bytes(size) == sum(state.nbytes for state in states)


def test_a_paged_kind_names_what_stands_in_for_it():
    for kind in OPTIMIZERS.values():
        if kind.stand_in is not None:
            assert OPTIMIZERS[kind.stand_in].state_bytes(10**6) == kind.state_bytes(10**6)
            assert not OPTIMIZERS[kind.stand_in].paged


def test_what_deepspeed_cannot_share_is_refused():
    for kind in OPTIMIZERS.values():
        if not kind.shared:
            with pytest.raises(InputError, match=f"--optimizer is {kind.name}"):
                make_group(TrainConfig, {"optimizer": kind.name, "deepspeed": "zero2"})


def test_the_leanest_is_suggested_and_the_help_names_all():
    assert kinds.leanest().state_bytes(10**6) == min(kind.state_bytes(10**6) for kind in OPTIMIZERS.values())
    assert all(name in kinds.describe_optimizers() for name in OPTIMIZERS)
