"""A rung spares LRs that lag only because it is early."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from autolrs_ray.core.rungs import Trunk, losers, steps_of_progress


def field() -> list[Trunk]:
    """Four LRs at rung 100: the second leads; the first has come as far as the leader had after 30 steps."""
    curve = [(10, 5.0), (30, 3.0), (60, 2.0), (100, 1.0)]
    scores = [2.9, 1.0, 1.05, 3.1]
    return [Trunk(lr, 0.0, scores={100: score}, curve=curve) for lr, score in zip((1, 3, 10, 30), scores, strict=True)]


@pytest.mark.parametrize(("since", "dropped"), [(None, {1, 30}), (60, {1, 30}), (30, {30}), (10, set()), (5, set())])
def test_an_lr_that_reached_what_the_leader_had_early_on_stays(since: float | None, dropped: set[int]) -> None:
    assert {trunk.lr for trunk in losers(field(), 100, 0.1, 0.25, None, since)} == dropped


@pytest.mark.parametrize(
    ("factor", "steps"), [(lambda step: 1.0, 30.0), (lambda step: step + 1.0, 100.0 * math.sqrt(0.3))]
)
def test_progress_is_the_sum_of_the_learning_rates(factor: Callable[[int], float], steps: float) -> None:
    assert steps_of_progress(0.3, 100, factor) == pytest.approx(steps, rel=0.01)


def test_finalists_are_capped_all_the_same() -> None:
    assert {trunk.lr for trunk in losers(field(), 100, 0.1, 0.25, 2, 10)} == {1, 30}


def test_without_early_reports_the_plain_rule_holds() -> None:
    trunks = field()
    for trunk in trunks:
        trunk.curve = []
    assert {trunk.lr for trunk in losers(trunks, 100, 0.1, 0.25, None, 30)} == {1, 30}
