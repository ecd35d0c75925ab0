"""Curves of a run's logs, whatever the logs hold."""

import math

import pytest

from qrosa.report.curves import number, points, smooth, window_of


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, [1], 10**400])
def test_what_is_no_number_is_left_out(value):
    assert number(value) is None
    assert points([{"step": 1, "loss": value}, {"step": 2, "loss": 3}, {"step": 4}], "loss") == [(2, 3)]


def test_a_smoothed_value_is_the_mean_of_the_last_ones():
    curve = [(step, float(step)) for step in range(1, 7)]
    assert smooth(curve, 3) == [(1, 1.0), (2, 1.5), (3, 2.0), (4, 3.0), (5, 4.0), (6, 5.0)]
    assert smooth(curve, 1) == curve
    assert smooth([(1, 1e30), (2, 1.0), (3, 1.0)], 2)[-1] == (3, 1.0)


@pytest.mark.parametrize(("steps", "window"), [(0, 1), (6, 1), (200, 20), (10_000, 50)])
def test_how_many_steps_are_smoothed_over(steps, window):
    assert window_of(steps) == window
