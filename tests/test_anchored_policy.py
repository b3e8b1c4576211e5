"""AnchoredPolicy: the race's rule, who trains when, longer runs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from autolrs_ray.core.envelopes import ENVELOPES, envelope_factor
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.segments import next_report
from tests.races import anchored, drive
from tests.simulation import Simulation

# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_rungs_and_tolerances_are_those_measured():
    early, late = (0.02, 0.04, 0.06, 0.08, 0.12), (0.16, 0.24, 0.32, 0.5, 0.75)
    plan = make_policy("anchored", 1000).plan
    assert [rung / 1000 for rung in plan.rungs] == [*early, *late]
    assert plan.tolerances == (0.01,) * 5 + (0.005,) * 5


def test_the_policy_applies_the_rule_at_each_of_its_rungs():
    """Of five LRs, 3 leads all the way; at every rung the outer ones are just within its tolerance, then one step beyond."""
    policy = anchored(1000, num_lrs=5, finalists=5)
    leader = policy.trunks[2].lr
    tolerance = dict(zip(policy.plan.rungs, policy.plan.tolerances, strict=True))
    seen = []

    def losses(lr, step):
        rung = min((rung for rung in policy.plan.rungs if rung >= step), default=1000)
        allowed = tolerance.get(rung, 0.0) * 0.999
        return 3.0 - (step == 1000) if lr == leader else 3.0 * (1 + allowed)

    drive(policy, losses)
    for event in policy.drain_events():
        if event["event"] == "decision":
            seen.append((event["step"], event["dropped"]))
            assert event["leader"] == leader
    assert seen == [(rung, 0) for rung in policy.plan.rungs]
    assert len(seen) == 10
    assert policy.trunks[2].status == "won"
    for victim in (0, 4):
        policy = anchored(1000, num_lrs=5, finalists=5)
        lr = policy.trunks[victim].lr
        for last, rung in enumerate(policy.plan.rungs):
            policy = anchored(1000, num_lrs=5, finalists=5)
            drive(policy, lambda x, step, at=rung, lr=lr: losses(x, step) * (1.001 if x == lr and step == at else 1.0))
            dropped = [e for e in policy.drain_events() if e["event"] == "trunk" and e["step"] < 1000]
            assert [event["lr"] for event in dropped] == [lr], (victim, rung, last)
            assert not any(step > rung for step in policy.trunks[victim].scores)


@pytest.mark.parametrize("total", [200, 1220, 1230, 50, 10])
def test_no_more_than_the_finalists_go_past_a_sixth_of_the_run(total):
    policy = anchored(total, num_lrs=6, finalists=2)
    late = round(0.16 * total)
    passed = set()

    def losses(lr, step):
        if step > late:
            passed.add(lr)
        return 1.0 + 1e-6 * lr

    drive(policy, losses)
    assert policy.done
    assert len(passed) <= 2


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, 3),
        (dict(num_lrs=4), 3),
        (dict(num_lrs=17), 5),
        (dict(infill=5), 5),
        (dict(num_lrs=24), 6),
        (dict(finalists=2), 2),
    ],
)
def test_a_denser_field_has_more_finalists_unless_it_is_told_how_many(options, places):
    """The leader's neighbours would take all places, and the LR below them that wins in the end be dropped."""
    policy = make_policy("anchored", 1000, **options)
    before = set()

    def losses(lr, step):
        if step > 160:
            before.add(lr)
        return 1.0 + 1e-6 * lr

    drive(policy, losses)
    assert len(before) == min(places, policy.num_lrs)
    assert policy.cost(100)[0] == pytest.approx(len(policy.trunks) * 0.16 + min(places, len(policy.trunks)) * 0.84)


def test_finalists_cap_at_the_last_rung_of_a_short_list():
    policy = anchored(100, num_lrs=6, finalists=1, rungs=(0.1, 0.2), tolerances=(0.5, 0.5))
    past = set()
    drive(policy, lambda lr, step: past.add(lr) or 1.0 + 1e-6 * lr if step > 20 else 1.0 + 1e-6 * lr)
    assert len(past) == 1


def test_who_is_alive_at_the_end_is_chosen_on_the_final_score():
    """The large LR lags within the tolerance all the way and overtakes at the end."""
    policy = anchored(1000, num_lrs=2, finalists=2)
    low, high = (trunk.lr for trunk in policy.trunks)
    drive(policy, lambda lr, step: (0.9 if lr == high else 1.0) if step == 1000 else (1.004 if lr == high else 1.0))
    assert [trunk.status for trunk in policy.trunks] == ["dropped", "won"]
    (done,) = [event for event in policy.drain_events() if event["event"] == "done"]
    assert (done["lr"], done["loss"], done["step"]) == (high, 0.9, 1000)
    assert low < high


@pytest.mark.parametrize(("averaging", "scores", "kept"), [(True, [1.0, 0.5], 1), (False, [1.0, 2.0], 0)])
def test_the_score_is_of_raw_or_averaged_weights_whichever_are_better(averaging, scores, kept):
    policy = anchored(100, num_lrs=2, averaging=averaging)
    policy.report("t00", Point(2, 1.0, None, 1.5))
    policy.report("t01", Point(2, 2.0, None, 0.5))
    assert [trunk.scores[2] for trunk in policy.trunks] == scores
    assert [trunk.status == "open" for trunk in policy.trunks] == [kept == 0, kept == 1]


@pytest.mark.parametrize(("raw", "averaged", "score"), [(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (3.0, None, 3.0)])
def test_weights_whose_loss_is_not_finite_are_not_the_better_ones(raw, averaged, score):
    policy = anchored(100, num_lrs=2)
    policy.report("t00", Point(2, raw, None, averaged))
    assert policy.trunks[0].scores == {2: score}


def test_a_trunk_has_diverged_where_neither_loss_is_finite():
    policy = anchored(100, num_lrs=2)
    policy.report("t00", Point(2, math.nan, None, math.inf))
    assert policy.trunks[0].status == "diverged"


def test_a_rungs_score_is_the_mean_of_its_last_quarter_of_reports():
    policy = anchored(1000, num_lrs=2)
    for step, loss in enumerate((9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0), start=13):
        policy.report("t00", Point(step, loss))
    assert policy.trunks[0].scores == {20: 1.5}
    for step, loss in enumerate((9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 5.0, 6.0), start=33):
        policy.report("t00", Point(step, loss))
    assert policy.trunks[0].scores[40] == 5.5


# -- who trains when ---------------------------------------------------------------------------------------------------


def test_no_rung_is_decided_before_every_open_trunk_has_passed_it():
    policy = anchored(1000, num_lrs=3, concurrency=3)
    for arm in ("t00", "t01"):
        assert policy.report(arm, Point(20, 1.0 if arm == "t00" else 9.0)) is Verdict.SAVE
    assert policy.decided == 0
    assert policy.is_open("t01")
    policy.report("t02", Point(20, 1.05))
    assert policy.decided == 1
    assert not policy.is_open("t01") or policy.trunks[1].lr > policy.trunks[0].lr
    assert policy.report("t01", Point(30, 9.0)) is Verdict.FINISH


def test_a_trunk_may_run_ahead_of_the_others_by_one_rung():
    policy = anchored(1000, num_lrs=2, concurrency=4)
    policy.issue("t00")
    assert policy.report("t00", Point(20, 1.0)) is Verdict.SAVE
    policy.saved("t00", 20, "a")
    assert policy.report("t00", Point(40, 1.0)) is Verdict.PAUSE
    policy.saved("t00", 40, "b")
    policy.withdraw("t00")
    assert [segment.arm for segment in policy.wanted()] == ["t01"]
    policy.report("t01", Point(20, 1.005))
    assert [segment.arm for segment in policy.wanted()] == ["t01", "t00"]


def test_the_least_trained_trunk_comes_first_and_others_make_way_for_it_on_a_full_house():
    policy = anchored(1000, num_lrs=3, concurrency=1)
    started = drive(policy, lambda lr, step: 1.0 + 1e-6 * lr)
    assert all(start == least for start, least in started)
    assert len(started) > 3 * len(policy.plan.rungs)  # they took turns
    policy = anchored(1000, num_lrs=3, concurrency=2)
    policy.issue("t00"), policy.issue("t01")
    assert policy.report("t00", Point(20, 1.0)) is Verdict.PAUSE  # t02 waits, and the house is full
    policy = anchored(1000, num_lrs=3, concurrency=3)
    policy.issue("t00"), policy.issue("t01")
    assert policy.report("t00", Point(20, 1.0)) is Verdict.SAVE  # t02 has a slot of its own


def test_every_segment_starts_at_the_trunks_last_checkpoint_under_the_envelope():
    policy = anchored(1000, num_lrs=2, concurrency=2, commits=20)
    policy.report("t00", Point(20, 1.0))
    policy.saved("t00", 20, "here")
    segment = next(segment for segment in policy.wanted() if segment.arm == "t00")
    assert (segment.start, segment.source, segment.boundaries[:3], segment.end) == (20, "here", (40, 50, 60), 1000)
    assert segment.lr_at(500) == pytest.approx(0.75 * policy.trunks[0].lr)


def test_the_run_ends_when_the_last_rival_of_a_finished_trunk_is_dropped():
    """Two slots of different speed: t00 is at the end while t01 still has to pass the last rung."""
    policy = anchored(100, num_lrs=2, concurrency=2)
    for step in policy._boundaries:
        policy.report("t00", Point(step, 1.0))
        policy.saved("t00", step, f"t00@{step}")
        if step < 75:
            policy.report("t01", Point(step, 1.0001))
            policy.saved("t01", step, f"t01@{step}")
    assert not policy.done
    assert policy.report("t01", Point(75, 2.0)) is Verdict.FINISH
    assert policy.done
    assert policy.wanted() == []


@pytest.mark.parametrize("slots", [2, 3, 8, 12])
@pytest.mark.parametrize(
    "options", [{}, {"infill": 4}, {"finalists": 1}, {"branches": 3}, {"drift": 0.5, "warmup": 0.2}]
)
def test_decisions_do_not_depend_on_the_order_of_arrival(slots, options):
    runs = [Simulation(anchored(concurrency=1, **options)).run()]
    runs += [
        Simulation(anchored(concurrency=slots, **options), slots=slots, order=np.random.default_rng(seed)).run()
        for seed in range(4)
    ]
    expected, *others = [(run.of("decision"), run.of("done")[0]["lr"], run.of("done")[0]["loss"]) for run in runs]
    assert all(other == expected for other in others)
    order = [[event["arm"] for event in run.of("rung")] for run in runs]
    assert order[1] != order[2]


def test_a_trunk_that_passed_a_rung_and_then_diverged_counts_at_that_rung_in_whatever_order():
    """t02 leads at the first rung and diverges after it: the others are measured against it all the same."""

    def run(first):
        policy = anchored(1000, num_lrs=3, concurrency=3)
        reports = {"t00": [Point(20, 1.2)], "t01": [Point(20, 1.005)], "t02": [Point(20, 1.0), Point(25, math.nan)]}
        for arm in first:
            for point in reports[arm]:
                policy.report(arm, point)
        return [event for event in policy.drain_events() if event["event"] == "decision"]

    decisions = [run(order) for order in (("t00", "t01", "t02"), ("t02", "t01", "t00"), ("t01", "t02", "t00"))]
    assert decisions[0][0]["leader"] == decisions[1][0]["leader"] == decisions[2][0]["leader"]
    assert decisions[0][0]["dropped"] == decisions[1][0]["dropped"] == decisions[2][0]["dropped"] == 1


# -- a longer run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_extended_run_is_one_run_of_the_longer_length(interrupted):
    """Under "wsd" the first 0.4 T are at a constant LR whatever T is: they are kept, the rest is trained again."""
    simulation = Simulation(anchored(200, envelope="wsd", warmup=0.1)).run()
    before, trained = simulation.of("done")[0], simulation.trained
    simulation.policy.extend(500)
    simulation.run() if not interrupted else None
    while interrupted and not simulation.policy.done:
        simulation.act()
        if len(simulation.verdicts) % 19 == 0:
            simulation.interrupt(anchored(500, envelope="wsd", warmup=0.1))
    alone = simulation.toy.train(500, lambda t: before["lr"] * envelope_factor("wsd", t, 500))
    done = simulation.of("done")[-1]
    assert (done["lr"], done["loss"], done["step"]) == (before["lr"], alone.loss, 500)
    assert {segment.warmup_steps for segment in simulation.started} == {20}  # of the run as it began
    assert interrupted or simulation.trained - trained == 500 - 80


def test_a_run_that_cannot_be_extended_says_why():
    with pytest.raises(ValueError, match=r"'quadratic' falls from the start: only wsd and constant"):
        Simulation(anchored()).run().policy.extend(400)
    with pytest.raises(ValueError, match="8 learning rates are still in the race"):
        anchored(envelope="wsd").extend(400)
    policy = Simulation(anchored(envelope="wsd")).run().policy
    with pytest.raises(ValueError, match="larger than 200, got 200"):
        policy.extend(200)
    policy.lost(next(path for path in policy.checkpoints() if "@80#" in path))
    with pytest.raises(ValueError, match="end of the hold is lost"):
        policy.extend(400)


# -- envelopes and rungs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ENVELOPES))
def test_envelopes_begin_at_one_and_end_at_zero(name):
    factors = [envelope_factor(name, step, 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[100] == (1.0 if name == "constant" else 0.0)
    assert all(after <= before for before, after in pairwise(factors))
    assert envelope_factor(name, 150, 100) == factors[100]  # a trainable that overshoots


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [("quadratic", 50, 0.75), ("quadratic", 90, 0.19), ("linear", 25, 0.75), ("cosine", 50, 0.5), ("wsd", 40, 1.0),
     ("wsd", 70, 0.5), ("constant", 99, 1.0), (None, 99, 1.0)],
)  # fmt: skip
def test_envelopes_have_their_written_out_values(name, step, factor):
    assert envelope_factor(name, step, 100) == pytest.approx(factor, abs=1e-12)


def test_an_envelope_of_ones_own_is_a_function_of_the_step():
    assert envelope_factor(lambda step: 1.0 / (1 + step), 3, 100) == 0.25
    with pytest.raises(ValueError, match=r"finite and >= 0 .*nan at step=7"):
        envelope_factor(lambda step: math.nan, 7, 100)


def test_rungs_that_fall_on_one_step_are_merged_and_none_lies_at_the_end():
    plan = RacePlan.from_fractions(10, (0.05, 0.1, 0.3, 0.5), (0.4, 0.3, 0.2, 0.1))
    assert (plan.rungs, plan.tolerances) == ((1, 3, 5), (0.3, 0.2, 0.1))
    assert RacePlan.from_fractions(10).rungs == (1, 2, 3, 5, 8)
    assert RacePlan.from_fractions(2).rungs == (1,)
    assert RacePlan.from_fractions(100, (0.5, 1.0), (0.1, 0.1)).rungs == (50,)


@pytest.mark.parametrize("total", [2, 3, 7, 20])
def test_short_runs_end_too(total):
    assert Simulation(anchored(total)).run().policy.done


def test_a_thrifty_race_expects_the_best_lr_to_settle_sooner_and_options_go_before_it():
    thorough, thrifty = (make_policy("anchored", 1000, effort=effort) for effort in ("thorough", "thrifty"))
    assert (thorough.settled, thorough._places, thorough.warmup_steps) == (0.64, 3, 200)
    assert (thrifty.settled, thrifty._places, thrifty.warmup_steps) == (0.5, 2, 200)
    assert thrifty.plan.rungs == (10, *thorough.plan.rungs)
    assert make_policy("anchored", 1000, effort="thrifty", settled=0.7, finalists=4).settled == 0.7


@pytest.mark.parametrize(
    ("options", "status"),
    [({}, "won"), ({"drift": 0.0}, "dropped"), ({"drift": 0.1}, "dropped"), ({"settled": 0.03}, "dropped")],
)
def test_a_slow_lr_that_comes_out_ahead_is_kept_while_the_best_may_fall_to_it(options, status):
    """Loss as a function of the sum of the LRs, a third of the leader's, and a floor that is lower."""
    policy = anchored(1000, num_lrs=2, lr_interval=(0.5, 4.5), **{"drift": 0.5, **options})
    slow = policy.trunks[0]
    drive(policy, lambda lr, step: (0.9 if lr == slow.lr else 1.0) + math.exp(-lr * step / 60.0), every=2)
    assert slow.status == status


def test_lrs_above_the_leader_and_out_of_its_reach_below_go_at_once():
    """Thirteen LRs half a decade apart, the third from above leads from the start; each other is far behind."""
    policy = anchored(1000, num_lrs=13, finalists=13, lr_interval=(10**-6.25, 10**0.25), drift=0.5)
    leader = policy.trunks[10]

    def losses(lr, step):
        return 1.0 if lr == leader.lr else 1.4 if step < 240 else 1.19 if step < 320 else 1.04

    drive(policy, losses)
    kept = {e["step"]: [round(2 * math.log10(lr / leader.lr)) for lr in e["kept"]]
            for e in policy.drain_events() if e["event"] == "decision"}  # fmt: skip
    assert kept == {
        20: [-5, -4, -3, -2, -1, 0], 40: [-4, -3, -2, -1, 0], 60: [-3, -2, -1, 0], 80: [-3, -2, -1, 0],
        120: [-2, -1, 0], 160: [-2, -1, 0], 240: [-1, 0], 320: [-1, 0], 500: [0], 750: [0],
    }  # fmt: skip


def test_past_early_one_report_a_boundary_is_asked_for():
    policy = anchored(1000, early=0.32, reports=2, commits=2)
    segment, steps = policy.wanted()[0], [0]
    while steps[-1] < 1000:
        steps.append(next_report(segment, steps[-1]))
    assert [step for step in steps if step > 160] == [200, 240, 280, 320, 500, 750, 1000]
