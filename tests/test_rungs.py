"""What one rung decides: an LR stays that is near the leader, or that the best LR may still fall to."""

from __future__ import annotations

import math

import pytest

from autolrs_ray.core.race.plan import TOLERANCES
from autolrs_ray.core.race.rule import Trunk, catch_up, losers, reach


def field(*scores: float) -> list[Trunk]:
    """Trunks with LRs .01, .1, 1, ... and these scores at rung 10."""
    return [Trunk(10.0 ** (i - 2), 0.0, scores={10: score}) for i, score in enumerate(scores)]


def dropped(*scores: float, **options: float) -> list[int]:
    """Indices of those that go."""
    trunks = field(*scores)
    return [trunks.index(trunk) for trunk in losers(trunks, 10, **options)]


@pytest.mark.parametrize("tolerance", sorted(set(TOLERANCES)))
def test_an_lr_may_be_worse_than_the_leader_by_the_tolerance_wherever_it_lies(tolerance: float) -> None:
    near, far = 2.0 * (1 + tolerance - 1e-6), 2.0 * (1 + tolerance + 1e-6)
    assert dropped(far, near, 2.0, near, far, tolerance=tolerance) == [0, 4]


def test_an_lr_within_reach_below_the_leader_may_be_worse_by_far() -> None:
    assert dropped(9.0, 9.0, 1.0, 1.1, tolerance=0.0, decades=1.0) == [0, 3]
    assert dropped(9.0, 9.0, 1.0, 1.1, tolerance=0.0, decades=2.0) == [3]
    assert dropped(9.0, 9.0, 1.0, 1.1, tolerance=0.2, decades=0.9) == [0, 1]
    assert dropped(1.4, 1.6, 1.0, tolerance=0.0, decades=2.0, allowance=0.5) == [1]
    assert dropped(1.04, 1.06, 1.0, tolerance=0.05, decades=2.0, allowance=0.01) == [1]


def test_negated_metrics_follow_the_same_rule() -> None:
    """mode="max": an accuracy of .90 is 10 % behind one of 1.0."""
    assert dropped(-0.98, -1.0, -0.91, -0.89, tolerance=0.10) == [3]
    assert dropped(-0.49, -0.51, -1.0, tolerance=0.10, decades=2.0, allowance=0.5) == [0]


def test_equals_stay_and_the_leader_is_never_dropped() -> None:
    assert dropped(1.0, 1.0, 1.0, tolerance=0.0) == []
    assert dropped(2.0, 1.0, 3.0, tolerance=0.0, finalists=1) == [0, 2]
    assert dropped(0.0, 0.0, tolerance=0.1) == []
    assert dropped(math.inf, math.inf, tolerance=0.1) == [1]


def test_finalists_cap_the_field_by_score() -> None:
    assert dropped(1.001, 1.003, 1.0, 1.004, 1.002, tolerance=0.5, finalists=3) == [1, 3]
    assert dropped(9.0, 8.0, 7.0, 1.0, tolerance=0.5, finalists=2, decades=5.0) == [0, 1]


@pytest.mark.parametrize(
    ("fraction", "decades"), [(0.02, 2.5), (0.04, 2.0), (0.08, 1.5), (0.16, 1.0), (0.32, 0.5), (0.64, 0.0), (0.9, 0.0)]
)
def test_the_best_lr_falls_by_half_a_decade_per_doubling_at_most(fraction: float, decades: float) -> None:
    assert reach(0.5, 0.64, fraction) == pytest.approx(decades, abs=1e-12)
    assert reach(0.0, 0.64, fraction) == 0.0


def test_how_far_behind_an_lr_within_reach_may_be_narrows_as_the_run_goes_on() -> None:
    fractions = [0.02, 0.08, 0.12, 72 / 600, 0.16, 0.24, 0.3, 0.32, 0.9]
    assert [catch_up(fraction) for fraction in fractions] == [math.inf, math.inf, 0.5, 0.5, 0.5, 0.2, 0.2, 0.05, 0.05]
