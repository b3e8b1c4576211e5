"""The race's rule on whole fields of real trainings, and what must not change its decisions."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolrs_ray.core.race.cost import bound, usual
from autolrs_ray.core.race.plan import RUNGS, RacePlan
from autolrs_ray.core.race.rule import Course, Reading, Untrained, walk

FIELDS = Path(__file__).parent / "fields" / "real.jsonl.gz"
PLAN = RacePlan.of(1000)

Readings = list[dict[float, Reading]]


@cache
def stored() -> dict[str, tuple[Untrained, Readings]]:
    """Whole fields: every LR's score and mean training loss at every rung; inf from where it diverged."""
    found = {}
    for line in gzip.decompress(FIELDS.read_bytes()).decode().splitlines():
        row: dict[str, Any] = json.loads(line)
        trunks = [
            {
                rung: Reading(math.inf if score is None else score, math.inf if train is None else train)
                for rung, score, train in zip(RUNGS, scores, losses, strict=True)
            }
            for scores, losses in zip(row["scores"], row["losses"], strict=True)
        ]
        untrained = Untrained(row["start"], row["first"], row["noise"], sampling=row.get("sampling"))
        found[row["name"]] = (untrained, trunks)
    return found


def race(untrained: Untrained, whole: Readings, plan: RacePlan = PLAN) -> tuple[Course, Readings]:
    """The race over a whole field, trunk by trunk as the rule asks; what it has read in the end."""
    seen: Readings = [{} for _ in whole]
    while (course := walk(seen, untrained, plan)).missing:
        for i, rung in course.missing.items():
            assert all(math.isfinite(reading.score) for reading in seen[i].values()), "one that diverged is asked for"
            seen[i].update({at: whole[i][at] for at in plan.fractions if at <= rung})
    return course, seen


def compute(seen: Readings) -> float:
    return sum(max(trunk, default=0.0) for trunk in seen)


def regret(untrained: Untrained, whole: Readings, winner: int) -> float:
    best = min(trunk[1.0].score for trunk in whole)
    return (whole[winner][1.0].score - best) / (untrained.score - best)


# -- whole fields ------------------------------------------------------------------------------------------------------


def test_the_walk_ends_near_the_best_of_every_stored_field():
    regrets, costs = {}, {}
    for name, (untrained, whole) in stored().items():
        course, seen = race(untrained, whole)
        assert course.winner is not None
        regrets[name], costs[name] = regret(untrained, whole, course.winner), compute(seen)
    assert len(regrets) == 50
    assert {name: found for name, found in regrets.items() if found > 0.02} == {}
    assert fmean(regrets.values()) < 0.0015
    assert fmean(costs.values()) < 2.1
    assert max(costs.values()) < 3.4


@pytest.mark.parametrize("reports", [4, 8, 10, 20])
def test_a_report_an_epoch_is_enough_where_there_is_no_plateau(reports: int):
    """What scatters is not known then; on the plateaus of deep nets without normalisation the walk goes too far down."""
    lost = set()
    for name, (untrained, whole) in stored().items():
        known = replace(untrained, noise=0.0, score_noise=0.0, sampling=None)
        course, _ = race(known, whole, PLAN.reported_every(PLAN.total_steps // reports))
        if regret(untrained, whole, course.winner) > 0.05:
            lost.add(name)
    assert lost <= {"mlp7_plateau-0", "mlp7_plateau-2", "six sigmoids, AdamW, 0"}


@pytest.mark.parametrize("change", [dict(close=0.03), dict(close=0.06), dict(settled=0.4), dict(patience=1)])
def test_the_rule_is_flat_about_its_numbers(change: dict[str, float]):
    regrets = []
    for untrained, whole in stored().values():
        course, _ = race(untrained, whole, replace(PLAN, **change))
        assert course.winner is not None
        regrets.append(regret(untrained, whole, course.winner))
    assert fmean(regrets) < 0.003


@given(st.integers(1, 12), st.randoms(use_true_random=False), st.booleans())
def test_no_race_costs_more_than_its_bound(count: int, random: Random, rough: bool):
    """Whatever the scores are, as long as they are finite."""
    whole = [{rung: Reading(random.gauss(0.8, 0.3), random.gauss(0.8, 0.2)) for rung in RUNGS} for _ in range(count)]
    _, seen = race(Untrained(1.0, 1.0, 0.1, patience=rough), whole)
    assert compute(seen) <= bound(count, PLAN, 1)[0] + 1e-9


def test_a_walk_that_goes_down_late_is_within_the_bound():
    """Every leader gets worse between .64 and .8 T, one after another."""
    whole = [{rung: Reading(0.5 + 0.01 * i, 0.5) for rung in RUNGS} for i in reversed(range(12))]
    for i, trunk in enumerate(whole):
        trunk[0.64], trunk[0.8] = Reading(0.2, 0.2), Reading(0.4 + 0.001 * i, 0.2)
        trunk[1.0] = Reading(0.4, 0.2)
    _, seen = race(Untrained(1.0, 1.0), whole)
    assert [max(trunk, default=0.0) for trunk in seen].count(0.8) >= 9
    assert 9.0 < compute(seen) <= bound(12, PLAN, 1)[0] == pytest.approx(10.4)
    for slots in range(1, 13):
        most, measured = bound(12, PLAN, slots), usual(12, PLAN, slots, run_ahead=True)
        assert all(1.0 <= low <= high for low, high in zip(measured, most, strict=True))
        assert most[1] <= most[0]
    assert bound(1, PLAN, 4) == usual(1, PLAN, 4, run_ahead=True) == (1.0, 1.0)


# -- what must not matter ----------------------------------------------------------------------------------------------


def changed(field: tuple[Untrained, Readings], scale: float, shift: float) -> tuple[Untrained, Readings]:
    untrained, whole = field

    def of(reading: Reading) -> Reading:
        return Reading(scale * reading.score + shift, None if reading.train is None else scale * reading.train + shift)

    train = None if untrained.train is None else scale * untrained.train + shift
    return (
        replace(
            untrained,
            score=scale * untrained.score + shift,
            train=train,
            noise=scale * untrained.noise,
            score_noise=scale * untrained.score_noise,
            sampling=None if untrained.sampling is None else scale * untrained.sampling,
        ),
        [{rung: of(reading) for rung, reading in trunk.items()} for trunk in whole],
    )


@given(
    st.sampled_from([*range(50)]),
    st.sampled_from([2.0**-30, 2.0**20, 1e-9, 1e6]),
    st.sampled_from([0.0, 2.0**10, -(2.0**20)]),
)
def test_neither_the_scale_of_a_loss_matters_nor_a_constant_added_to_it(index: int, scale: float, shift: float):
    """Losses are rounded to 12 binary places first, or what a constant takes off their mantissa would decide ties."""
    name = sorted(stored())[index]
    untrained, whole = stored()[name]
    rounded = changed_by(untrained, whole, lambda x: round(x * 2**12) / 2**12 if math.isfinite(x) else x)
    plain, _ = race(*rounded)
    other, _ = race(*(changed(rounded, scale, 0.0) if shift == 0.0 else changed(rounded, 1.0, shift)))
    assert [(d.leader, d.play, d.judged) for d in other.decisions] == [
        (d.leader, d.play, d.judged) for d in plain.decisions
    ]
    assert other.winner == plain.winner


def changed_by(untrained: Untrained, whole: Readings, of: Any) -> tuple[Untrained, Readings]:
    return (
        replace(
            untrained,
            score=of(untrained.score),
            train=None if untrained.train is None else of(untrained.train),
            noise=of(untrained.noise) + 2.0**-13,  # between two of the places, so that nothing equals it
        ),
        [
            {at: Reading(of(r.score), None if r.train is None else of(r.train)) for at, r in trunk.items()}
            for trunk in whole
        ],
    )


# -- one rung at a time ------------------------------------------------------------------------------------------------


def field_of(*finals: float, start: float = 1.0, start_at: float = 0.0) -> tuple[Untrained, Readings]:
    """Trunks whose scores fall from `start` in proportion to the log of the steps to these at T."""

    def score(final: float, rung: float) -> float:
        return start - (start - final) * max(0.0, math.log(rung / 0.01) / math.log(100))

    return Untrained(start, start), [
        {rung: Reading(score(final, rung), score(final, rung)) for rung in RUNGS} for final in finals
    ]


def test_two_go_on_and_the_rest_waits():
    untrained, whole = field_of(0.5, 0.4, 0.2, 0.3, 0.6)
    course, seen = race(untrained, whole)
    assert course.winner == 2
    assert seen[0] == {}
    assert max(seen[4]) == max(seen[3]) == 0.02  # all of the walk is done at the first rung
    assert course.decisions[0].play == {1, 2}
    assert max(seen[1]) == 0.32  # from .3 T on the one below goes on only while it is near


def test_the_one_above_goes_on_from_the_end_of_the_rise_while_it_is_near():
    untrained, whole = field_of(0.5, 0.3, 0.29)
    for rung in RUNGS:
        if rung < 0.5:
            whole[1][rung] = Reading(whole[2][rung].score - 0.01, whole[2][rung].train)
    course, _ = race(untrained, whole)
    assert [(d.rung, sorted(d.play)) for d in course.decisions if d.rung in (0.16, 0.2)] == [
        (0.16, [0, 1]),
        (0.2, [0, 1]),
    ]
    assert course.winner == 1  # paused before the rise's end, the one above does not come back
    for rung in RUNGS:
        if rung < 0.2:
            whole[1][rung], whole[2][rung] = Reading(whole[2][rung].score + 0.01, 0.3), whole[2][rung]
    course, _ = race(untrained, whole)
    assert course.winner == 2
    assert {2, 1} <= next(d.play for d in course.decisions if d.rung == 0.32)


def test_while_nothing_has_been_learned_nothing_is_judged():
    """The largest LR whose training loss has not risen stands in for the leader; the smaller ones wait."""
    untrained, whole = field_of(1.0, 1.0, 0.2, 1.0, 1.0)
    untrained = replace(untrained, noise=0.05)
    for rung in RUNGS:
        whole[4][rung] = Reading(2.0, 2.0)
        if rung <= 0.24:  # a plateau, over which scores scatter by chance
            whole[2][rung] = Reading(1.02, 1.02)
            whole[1][rung] = whole[3][rung] = Reading(0.99, 1.0)
    course, seen = race(untrained, whole)
    assert [(d.leader, d.judged) for d in course.decisions[:9]] == [(3, False)] * 9
    assert course.winner == 2
    assert max(seen[1], default=0.0) <= 0.64


def test_batches_that_scatter_more_than_all_there_is_to_learn_hide_neither_the_learning_nor_the_order():
    """A regression with outliers: at .03 T the batches of all LRs hold some; their training losses say nothing."""
    untrained, whole = field_of(0.9, 0.7, 0.3, 0.6)
    for trunk in whole:
        for n, rung in enumerate(RUNGS):
            trunk[rung] = Reading(trunk[rung].score, 1.2 + 3.0 * (n == 1))
    for sampling in (None, 0.05):
        course, seen = race(replace(untrained, noise=1.0, sampling=sampling), whole)
        assert max(seen[0], default=0.0) <= 0.02
        assert {d.judged for d in course.decisions[4:]} == {sampling is not None}
    assert course.winner == 2
    course, _ = race(replace(untrained, noise=1.0, sampling=0.9), whole)
    assert {d.judged for d in course.decisions} == {False}  # three quarters of a progress that chance may have made


def test_after_a_plateau_that_ends_late_the_one_below_has_as_long_again_to_catch_up():
    """A deep network without normalisation: the larger LR starts to learn at .32 T, the better one at .4 T."""
    untrained, whole = field_of(1.0, 0.2, 0.5)
    untrained = replace(untrained, noise=0.05)
    for rung in RUNGS:
        if rung < 0.32:
            whole[2][rung] = Reading(1.0, 1.0)
        if rung < 0.5:
            whole[1][rung] = Reading(1.0, 1.0)
    course, _ = race(untrained, whole)
    assert next(d.rung for d in course.decisions if d.judged) == 0.32
    assert course.winner == 1


def test_a_validation_loss_that_does_not_follow_the_training_loss_is_not_judged():
    untrained, whole = field_of(0.4, 0.3, 0.35)
    for trunk in whole:
        for rung in RUNGS[:6]:
            trunk[rung] = Reading(5.0, trunk[rung].train)  # running statistics lag behind
    course, _ = race(untrained, whole)
    assert {d.judged for d in course.decisions if d.rung <= 0.12} == {False}
    assert course.winner == 1


def destroyed(dead: int, learning: int) -> tuple[Untrained, Readings]:
    """Inputs of the size of hundreds: the untrained model reads 17. Of some LRs nothing but the bias is left at the first rung,
    which reads 2.3 or so; the others come down from 17 and pass them at .12 T."""
    whole: Readings = []
    for i in range(learning):
        best = 0.5 + 0.1 * (learning - 1 - i)
        slow = {rung: 17.0 * (0.02 / rung) ** 1.4 * 0.9**i + best * (1.0 - rung / 4) for rung in RUNGS}
        whole.append({rung: Reading(score, score) for rung, score in slow.items()})
    for i in range(dead):
        flat = {rung: 2.3 - 0.01 * i + 2.0 * (0.02 / rung) ** 4 for rung in RUNGS}
        whole.append({rung: Reading(score, score) for rung, score in flat.items()})
    return Untrained(17.0, 17.0, 3.0, 0.5), whole


@pytest.mark.parametrize("dead", [2, 3, 4, 7])
def test_the_walk_passes_over_networks_that_large_learning_rates_have_destroyed(dead: int):
    untrained, whole = destroyed(dead, learning=4)
    course, _ = race(untrained, whole)
    assert course.winner == 3
    assert course.decisions[0].leader > 3  # at first they are far ahead


def test_where_all_are_stuck_the_walk_goes_on_as_if_none_was():
    flat = [dict.fromkeys(RUNGS, Reading(score, score)) for score in (0.4, 0.3, 0.2, 0.1)]
    course, seen = race(Untrained(1.0, 1.0), flat)
    assert course.winner == 3
    assert max(seen[2]) == 0.32
    assert [max(trunk) for trunk in seen[:2]] == [0.24, 0.24]


def test_a_trunk_that_blows_up_after_the_rise_hands_over_to_the_one_below():
    untrained, whole = field_of(0.5, 0.4, 0.3, 0.2)
    for rung in RUNGS:
        if rung >= 0.64:
            whole[3][rung] = Reading(math.inf)
    course, _ = race(untrained, whole)
    assert course.winner == 2


def test_a_leader_that_gets_worse_lets_the_next_below_join_late():
    untrained, whole = field_of(0.5, 0.45, 0.4, 0.2)
    for rung in RUNGS:
        if rung >= 0.5:
            whole[3][rung] = Reading(0.45 + 0.5 * rung, 0.2)  # it learns its data by heart
    course, _ = race(untrained, whole)
    assert course.winner in (1, 2)


def test_when_all_have_diverged_the_last_that_was_given_up_comes_back():
    untrained, whole = field_of(0.9, 0.8, 0.3)
    for trunk in whole[:2]:
        for rung in RUNGS[3:]:
            trunk[rung] = Reading(math.inf)
    whole[2] = {rung: Reading(0.95 if rung < 0.06 else 0.3, 0.95) for rung in RUNGS}
    course, _ = race(untrained, whole)
    assert course.winner == 2
    dead = [dict.fromkeys(RUNGS, Reading(math.inf))] * 3
    course, _ = race(untrained, dead)
    assert course.winner is None


@pytest.mark.parametrize("order", [(0.3, 0.2), (0.2, 0.3)])
def test_a_tie_goes_to_the_one_with_the_lower_training_loss_and_never_to_a_position(order: tuple[float, float]):
    untrained = Untrained(1.0, 1.0)
    whole = [{rung: Reading(0.5, train) for rung in RUNGS} for train in order]
    course, _ = race(untrained, whole)
    assert course.winner == order.index(0.2)
    assert {d.leader for d in course.decisions} == {order.index(0.2)}


def test_the_end_is_judged_by_the_metric_where_there_is_one():
    untrained = Untrained(1.0, 1.0)
    whole = [{rung: Reading(score, 0.5, final) for rung in RUNGS} for score, final in ((0.500, -0.9), (0.499, -0.8))]
    course, _ = race(untrained, whole)
    assert {d.leader for d in course.decisions[:-1]} == {1}
    assert course.winner == 0
