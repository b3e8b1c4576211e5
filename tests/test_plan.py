"""The scale of log learning rates that learning rates are laid out on."""

from __future__ import annotations

import math

import pytest

from autolrs_ray.core.envelopes import LogInterval


@pytest.mark.parametrize(("low", "high"), [(1e-5, 10.0), (1e-3, 1e-1), (1e-7, 3e-7)])
def test_the_ends_are_0_and_1_and_ways_there_and_back_meet(low: float, high: float) -> None:
    interval = LogInterval(low, high)
    assert [interval.x(low), interval.x(high)] == [0.0, 1.0]
    for x in (-0.3, 0.0, 0.125, 0.5, 0.99, 1.0, 1.2):
        assert interval.x(interval.lr(x)) == pytest.approx(x, abs=1e-12)


def test_equal_distances_are_equal_ratios() -> None:
    interval = LogInterval(1e-4, 1.0)
    assert [interval.lr(i / 4) for i in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_learning_rates_are_those_that_earlier_runs_were_given_to_the_last_bit() -> None:
    """Resumed runs compare and group learning rates as floats."""
    low, high = 1e-5, 10.0
    for x in (0.041666666666666664, 0.3, 0.7071067811865476):
        assert LogInterval(low, high).lr(x) == math.exp(math.log(low) + x * (math.log(high) - math.log(low)))
