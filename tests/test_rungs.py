"""A rung spares LRs that lag only because it is early."""

from __future__ import annotations

import pytest

from autolrs_ray.core.rungs import Trunk, losers


def field() -> list[Trunk]:
    """Four LRs at rung 100: the second leads; the first has come as far as the leader had after 30 steps."""
    curve = [(10, 5.0), (30, 3.0), (60, 2.0), (100, 1.0)]
    scores = [2.9, 1.0, 1.05, 3.1]
    return [Trunk(lr, 0.0, scores={100: score}, curve=curve) for lr, score in zip((1, 3, 10, 30), scores, strict=True)]


@pytest.mark.parametrize(("lag", "dropped"), [(1.0, {1, 30}), (0.6, {1, 30}), (0.3, {30}), (0.1, set()), (0.05, set())])
def test_an_lr_that_reached_what_the_leader_had_early_on_stays(lag: float, dropped: set[int]) -> None:
    assert {trunk.lr for trunk in losers(field(), 100, 0.1, 0.25, None, lag)} == dropped


def test_finalists_are_capped_all_the_same() -> None:
    assert {trunk.lr for trunk in losers(field(), 100, 0.1, 0.25, 2, 0.1)} == {1, 30}


def test_without_early_reports_the_plain_rule_holds() -> None:
    trunks = field()
    for trunk in trunks:
        trunk.curve = []
    assert {trunk.lr for trunk in losers(trunks, 100, 0.1, 0.25, None, 0.3)} == {1, 30}
