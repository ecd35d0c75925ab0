"""The outer step: weights, clipping and the Nesterov step against torch's, as functions of tensors and numbers."""

import math

import pytest
import torch

from qrosa.errors import StorageError
from qrosa.optim.outer_step import FIRST_MEETINGS, OuterPart, UsualNorms, clip_move, move_weights


def usual(norm=10.0, meetings=FIRST_MEETINGS):
    known = UsualNorms()
    for index in range(meetings):
        known = known.after([norm * (1 + 0.01 * (index % 2)), norm])
    return known


def test_the_step_is_torchs_nesterov():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    part = OuterPart(start, lr=0.8, momentum=0.85)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([theirs], lr=0.8, momentum=0.85, nesterov=True)
    for _ in range(4):
        move = torch.randn(50, generator=generator)
        theirs.grad = -move
        reference.step()
        part.step(move.clone())
    torch.testing.assert_close(part.values, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_rate_one_without_momentum_is_plain_averaging():
    part = OuterPart(torch.ones(3), lr=1.0, momentum=0.0)
    part.step(torch.tensor([1.0, 2.0, 3.0]))
    assert part.values.tolist() == [2.0, 3.0, 4.0]


def test_equal_moves_weigh_the_same_and_longer_ones_less_whatever_their_scale():
    assert move_weights([3.0, 3.0, 3.0, 3.0], UsualNorms()) == [0.25] * 4
    for scale in (1e-3, 1.0, 1e3):
        short, long = move_weights([10 * scale, 11 * scale], UsualNorms())
        assert short + long == pytest.approx(1) and short > long
        assert short / long == pytest.approx(math.exp(1 / 10.5))
    assert move_weights([0.0, 0.0], UsualNorms()) == [0.5, 0.5]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 100.0])
def test_an_unusual_move_does_not_count(odd):
    known = usual()
    assert move_weights([10.0, odd], known) == [1.0, 0.0]
    assert move_weights([10.2, 9.9, odd], known)[2] == 0.0
    assert known.after([10.0, odd]).mean == pytest.approx(10.0, rel=0.01)


def test_before_enough_meetings_only_what_is_not_finite_is_left_out():
    early = usual(meetings=FIRST_MEETINGS - 1)
    assert move_weights([10.0, 100.0], early)[1] > 0
    assert move_weights([10.0, math.nan], early) == [1.0, 0.0]
    assert early.most == math.inf


def test_machines_that_all_moved_far_go_back_but_not_for_ever():
    known, backs = usual(), 0
    while not any(move_weights([40.0, 41.0], known)):
        known, backs = known.after([40.0, 41.0]), backs + 1
    assert 1 <= backs <= 5
    assert known.after([math.nan, math.inf]) == known


def test_a_long_mean_move_is_clipped_to_what_is_usual():
    move = torch.full((4,), 10.0)
    assert clip_move(move, 5.0) == pytest.approx(20.0)
    assert float(torch.linalg.vector_norm(move)) == pytest.approx(5.0)
    assert clip_move(move, math.inf) == pytest.approx(5.0)
    part = OuterPart(torch.zeros(4), lr=1.0, momentum=0.0)
    part.usual = usual(norm=1.0)
    part.step(torch.full((4,), 10.0))
    assert float(torch.linalg.vector_norm(part.values)) == pytest.approx(part.usual.most)


def test_the_state_comes_back_to_the_bit_and_another_size_is_refused():
    part = OuterPart(torch.zeros(5), lr=0.7, momentum=0.9)
    part.step(torch.randn(5, generator=torch.Generator().manual_seed(1)))
    part.usual = usual(norm=math.pi)
    other = OuterPart(part.values, lr=0.7, momentum=0.9)
    other.load_state_tensors(part.state_tensors())
    assert torch.equal(other.velocity, part.velocity) and other.usual == part.usual
    for tensors in ({}, {**part.state_tensors(), "velocity": torch.zeros(4)}):
        with pytest.raises(StorageError, match="does not match"):
            other.load_state_tensors(tensors)
