"""AnchoredPolicy: the race's rule (nothing is dropped that could still change places), and its survival of trouble."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from autolrs_ray.core import surrogate
from autolrs_ray.core.plan import ENVELOPES, RUNGS, RacePlan, envelope_factor
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from autolrs_ray.core.rungs import Trunk, infill
from autolrs_ray.core.segments import next_report
from tests.simulation import Simulation, diverging


def anchored(total_steps=200, lr_interval=(1e-3, 10.0), concurrency=1, **options):
    return make_policy(
        "anchored",
        total_steps,
        lr_interval,
        0,
        concurrency,
        **{"warmup": 0.0, "drift": 0.0, "num_lrs": 8, "finalists": 8, **options},
    )


def field(scores, rung=10, xs=None):
    """Trunks with LRs 1, 2, 3, ... and these scores at `rung`."""
    xs = xs or [(i + 0.5) / len(scores) for i in range(len(scores))]
    return [Trunk(float(i + 1), x, scores={rung: s}) for i, (s, x) in enumerate(zip(scores, xs, strict=True))]


def lrs(trunks):
    return [trunk.lr for trunk in trunks]


def drive(policy, losses, can_save=True, every=None):
    """Run every segment wanted to its end, with loss losses(lr, step); returns what was started. Reports come at the
    boundaries, or `every` so many steps, of which the boundaries must be multiples."""
    started = []
    while not policy.done and (wanted := policy.wanted()):
        segment = wanted[0]
        started.append((segment.start, min(trunk.step for trunk in policy.trunks if trunk.status == "open")))
        policy.issue(segment.arm)
        for step in segment.boundaries if every is None else range(segment.start + every, segment.end + 1, every):
            verdict = policy.report(segment.arm, Point(step, losses(segment.lr, step)), can_save)
            if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
                policy.saved(segment.arm, step, f"{segment.arm}@{step}")
            if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
                break
        policy.withdraw(segment.arm)
    return started


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
@pytest.mark.parametrize("options", [{}, {"infill": 4}, {"finalists": 1}, {"branches": 3}])
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


# -- branches ----------------------------------------------------------------------------------------------------------


def late_bloomer(factor, fork=64):
    """Losses of a race that LR 1 leads until the fork; after it the one nearest `factor` times the leader's is best."""

    def losses(lr, step):
        best = 1.0 if step <= fork else factor
        return 1.0 + 0.2 * abs(math.log(lr / best))

    return losses


def test_branches_start_from_the_leaders_state_at_the_fork_with_up_to_four_times_its_lr():
    policy = anchored(num_lrs=5, branches=3, lr_interval=(0.1, 10.0))
    drive(policy, late_bloomer(2.0))
    (leader,) = [number for number, trunk in enumerate(policy.trunks) if abs(trunk.lr - 1.0) < 1e-9]
    branches = policy.trunks[5:]
    assert [trunk.lr for trunk in branches] == pytest.approx([4.0 ** (1 / 6), 2.0, 4.0 ** (5 / 6)])
    assert all((trunk.parent, trunk.origin) == (leader, (64, f"t{leader:02d}@64")) for trunk in branches)
    assert [trunk.status for trunk in branches] == ["dropped", "won", "dropped"]
    assert policy.trunks[leader].status == "dropped"


def test_the_leader_goes_on_where_no_branch_is_better():
    policy = anchored(num_lrs=5, branches=3, lr_interval=(0.1, 10.0))
    drive(policy, late_bloomer(1.0))
    assert [trunk.lr for trunk in policy.trunks if trunk.status == "won"] == pytest.approx([1.0])


def test_no_rung_past_the_fork_is_decided_before_the_branches_have_begun():
    policy = anchored(num_lrs=1, branches=2, concurrency=4)
    (segment,) = policy.wanted()
    policy.issue("t00")
    for step in [step for step in segment.boundaries if step <= 150]:
        policy.report("t00", Point(step, 1.0))
        if step < 64:
            policy.saved("t00", step, f"t00@{step}")
    assert policy.decided == policy.plan.rungs.index(64) + 1
    assert policy.breadth == 3
    policy.saved("t00", 64, "t00@64")
    assert [(segment.arm, segment.start, segment.source) for segment in policy.wanted()] == [
        ("t01", 64, "t00@64"), ("t02", 64, "t00@64"),
    ]  # fmt: skip


def test_a_trunk_that_starts_again_needs_no_checkpoint_of_its_first_life():
    policy = anchored(num_lrs=2, branches=1, lr_interval=(0.1, 10.0), rungs=(0.32,), tolerances=(0.01,))
    policy.report("t00", Point(64, 2.0))
    policy.saved("t00", 64, "t00@64")
    policy.report("t01", Point(64, 1.0))
    assert [trunk.status for trunk in policy.trunks] == ["dropped", "open"]
    assert policy.checkpoints() == set()
    policy.report("t01", Point(70, math.nan))
    assert [trunk.status for trunk in policy.trunks] == ["open", "diverged"]
    assert policy.checkpoints() == set()


def test_a_fork_whose_checkpoint_could_not_be_written_costs_the_branches_and_not_the_run():
    policy = anchored(num_lrs=1, branches=2)
    (segment,) = policy.wanted()
    policy.issue("t00")
    for step in segment.boundaries:
        policy.report("t00", Point(step, 1.0))
        if step != 64:
            policy.saved("t00", step, f"t00@{step}")
    assert policy.done
    assert len(policy.trunks) == 1


def test_a_branch_that_loses_its_checkpoints_goes_back_to_the_fork_and_without_that_leaves_the_race():
    policy = anchored(num_lrs=5, branches=1, lr_interval=(0.1, 10.0))
    simulation = Simulation(policy)
    while not any(trunk.parent is not None and trunk.step > trunk.origin[0] for trunk in policy.trunks):
        simulation.act()
    branch = policy.trunks[5]
    assert branch.origin[1] in policy.checkpoints()
    own = branch.checkpoint
    simulation.leave("t05")
    policy.lost(own)
    assert (branch.step, branch.checkpoint) == (branch.previous or branch.origin)
    policy.lost(branch.checkpoint)
    if branch.status == "open":
        policy.lost(branch.origin[1])
    assert branch.status == "failed"
    simulation.tidy()
    simulation.run()
    assert simulation.policy.done


def test_a_branch_stays_with_its_own_checkpoint_when_the_fork_is_lost_and_its_parent_comes_back_when_both_are():
    policy = anchored(num_lrs=1, branches=1, lr_interval=(0.1, 10.0))
    simulation = Simulation(policy)
    while not policy.done:
        simulation.act()
        if len(policy.trunks) == 2 and policy.trunks[0].status == "open" and policy.trunks[1].step > 64:
            if "t00" in simulation.running:
                simulation.leave("t00")
            policy.failed("t00", "the test says so")
    parent, branch = policy.trunks
    assert (parent.status, branch.status) == ("failed", "won")
    policy.lost(branch.origin[1])
    assert policy.done
    for path in sorted(policy.checkpoints()):
        policy.lost(path)
    assert (parent.status, parent.step, branch.status) == ("open", 0, "failed")
    assert "starts again" in policy.drain_events()[-1]["message"]
    simulation.tidy()
    assert simulation.run().policy.trunks[0].status == "won"


def test_the_run_ends_when_the_branch_that_was_waited_for_has_lost_its_checkpoints():
    options = dict(tolerances=(9.0,) * len(RUNGS), rungs=RUNGS, concurrency=2)
    policy = anchored(num_lrs=1, branches=1, lr_interval=(0.1, 10.0), **options)
    simulation = Simulation(policy, slots=2)
    while policy.trunks[0].step < 200:
        simulation.act()
    parent, branch = policy.trunks
    assert (parent.status, branch.status) == ("open", "open")
    for path in sorted(policy.checkpoints() - {parent.checkpoint, parent.previous[1]}):
        policy.lost(path)
    assert (parent.status, branch.status) == ("won", "failed")


def test_a_trunk_that_has_lost_its_checkpoints_trains_again_past_rungs_that_it_had_passed():
    """Its scores stay, and no rung after the fork is decided before its branches have begun."""
    policy = anchored(num_lrs=1, branches=1)
    (segment,) = policy.wanted()
    policy.issue("t00")
    for step in [boundary for boundary in segment.boundaries if boundary <= 150]:
        policy.report("t00", Point(step, 1.0))
    policy.withdraw("t00")
    assert policy.plan.rungs[policy.decided - 1] == 64
    assert policy.trunks[0].step == 0
    assert [segment.arm for segment in policy.wanted()] == ["t00"]


# -- in-fill -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0, 3, 7])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_infill_lies_beside_and_between_the_survivors_and_inside_the_interval(best, count):
    policy = anchored(1000, num_lrs=8, infill=count, concurrency=8)
    for i, _ in enumerate(policy.trunks[:8]):
        policy.report(f"t{i:02d}", Point(20, 1.0 + 0.04 * abs(i - best)))
    alive = [trunk.x for trunk in policy.trunks[:8] if trunk.status == "open"]
    added = policy.trunks[8:]
    assert min(count, 3) <= len(added) <= count  # there may not be room for all
    for trunk in added:
        assert max(0.0, min(alive) - 1 / 8) - 1e-9 <= trunk.x <= min(1.0, max(alive) + 1 / 8) + 1e-9
        assert 1e-3 * (1 - 1e-9) <= trunk.lr <= 10.0 * (1 + 1e-9)
        assert trunk.infill
    xs = [trunk.x for trunk in policy.trunks]
    assert min(abs(a - b) for i, a in enumerate(xs) for b in xs[:i]) > 0.03  # a quarter of the field's spacing
    assert {segment.start for segment in policy.wanted() if int(segment.arm[1:]) >= 8} == {0}


def test_infill_keeps_away_from_what_diverged_before_the_rung():
    trunks = field([1.02, 1.0, 9.0, 9.0], xs=[0.125, 0.375, 0.625, 0.875])
    for trunk in trunks[2:]:
        trunk.status, trunk.scores = "diverged", {}
    assert max(infill(trunks, 10, 0.25, 5)) <= 0.5 + 1e-9


def test_infill_trunks_take_part_in_the_next_decision():
    policy = anchored(1000, num_lrs=4, infill=2, concurrency=9)
    for i in range(4):
        policy.report(f"t{i:02d}", Point(20, 1.0 + 0.01 * i))
    for i in range(4):
        policy.report(f"t{i:02d}", Point(40, 1.0 + 0.01 * i))
    assert policy.decided == 1
    for arm in ("t04", "t05"):
        policy.report(arm, Point(40, 0.5))
    assert policy.decided == 2
    assert [trunk.status for trunk in policy.trunks[:4]] == ["dropped"] * 4


def test_a_failing_surrogate_costs_the_infill_and_not_the_run(monkeypatch):
    monkeypatch.setattr(surrogate, "propose", lambda *args, **kwargs: 1 / 0)
    simulation = Simulation(anchored(infill=3)).run()
    assert len(simulation.of("proposal")) == 8
    assert "no in-fill LR" in simulation.of("warning")[0]["message"]


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_diverged_trunks_leave_the_race():
    simulation = Simulation(anchored())
    simulation.change = diverging(above=1.0)(simulation)
    simulation.run()
    statuses = {trunk.status for trunk in simulation.policy.trunks if trunk.lr > 1.0}
    assert statuses == {"diverged"}
    assert simulation.of("done")[0]["lr"] <= 1.0


def test_a_race_without_survivors_ends_with_every_lr_that_was_tried():
    simulation = Simulation(anchored())
    simulation.change = diverging(above=0.0)(simulation)
    with pytest.raises(
        AutoLRSError, match=r"no learning rate is left in the race: 0.00178 \(diverged\).*Lower lr_interval"
    ):
        simulation.run()


def test_if_the_last_leader_diverges_late_the_best_dropped_lr_below_it_starts_again():
    """One LR is so good at the first rungs that all others go; then it blows up."""
    simulation = Simulation(anchored())
    best = simulation.policy.trunks[6].lr

    def change(arm, point):
        lr = simulation.running[arm][0].lr
        loss = (math.nan if point.step > 100 else 0.01) if lr == best else 1.0 + abs(math.log(lr / 0.1))
        return replace(point, loss=loss, averaged_loss=loss)

    simulation.change = change
    simulation.run()
    assert simulation.of("done")[0]["lr"] == min(
        (t.lr for t in simulation.policy.trunks), key=lambda x: abs(math.log(x / 0.1))
    )
    assert "starts again" in simulation.of("warning")[0]["message"]


def test_a_trunk_that_had_run_ahead_when_it_was_dropped_is_not_preferred_for_it():
    for ahead in (False, True):
        policy = anchored(1000, num_lrs=3, concurrency=3)
        policy.report("t00", Point(20, 2.0))
        if ahead:
            policy.report("t00", Point(40, 2.0))
        policy.report("t01", Point(20, 1.9))
        policy.report("t02", Point(20, 1.0))
        assert [trunk.status for trunk in policy.trunks] == ["dropped", "dropped", "open"]
        policy.report("t02", Point(30, math.nan))
        assert [trunk.status for trunk in policy.trunks] == ["dropped", "open", "diverged"]
        assert [segment.arm for segment in policy.wanted()] == ["t01"]


def test_a_trunk_that_starts_again_needs_none_of_its_old_checkpoints():
    policy = anchored(100, num_lrs=2, concurrency=2, envelope="wsd")
    for step in (s for s in policy._boundaries if s < 75):
        for arm, loss in (("t00", 1.001), ("t01", 1.0)):
            policy.report(arm, Point(step, loss))
            policy.saved(arm, step, f"{arm}@{step}")
    assert "t00@40" in policy.checkpoints()  # the end of the hold
    for arm, loss in (("t00", 2.0), ("t01", 1.0)):
        policy.report(arm, Point(75, loss))
    policy.report("t01", Point(76, math.nan))
    assert [(segment.arm, segment.start) for segment in policy.wanted()] == [("t00", 0)]
    assert policy.checkpoints() == set()


def test_a_rungs_score_is_the_same_for_a_trial_that_was_restored_before_it():
    """Seven reports a rung: with the one at the boundary before them, two would count instead of one."""
    whole, losses = anchored(1000, num_lrs=2, reports=7), [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    whole.report("t00", Point(20, 10.0))
    whole.saved("t00", 20, "c")
    restored = anchored(1000, num_lrs=2, reports=7)
    restored.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for policy in (whole, restored):
        for step, loss in zip((22, 25, 28, 31, 34, 37, 40), losses, strict=True):
            policy.report("t00", Point(step, loss))
    assert whole.trunks[0].scores == restored.trunks[0].scores == {20: 10.0, 40: 3.0}


def test_failing_trunks_leave_the_race():
    simulation = Simulation(anchored())
    simulation.change = lambda arm, point: "fail" if arm in ("t03", "t05") else None
    simulation.run()
    assert [simulation.policy.trunks[i].status for i in (3, 5)] == ["failed", "failed"]
    assert len(simulation.of("warning")) == 2
    assert simulation.policy.done


def test_the_failure_of_the_last_trunk_ends_the_run_with_its_checkpoint():
    policy = anchored(100, num_lrs=2, concurrency=2)
    policy.report("t00", Point(2, 1.0))
    policy.saved("t00", 2, "here")
    policy.report("t01", Point(2, 9.0))
    with pytest.raises(AutoLRSError, match=r"failed for good \(killed\).*here \(step 2\).*resume"):
        policy.failed("t00", "killed")
    restored = anchored(100, num_lrs=2)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert [(segment.arm, segment.start) for segment in restored.wanted()] == [("t00", 2)]


def test_a_cause_that_fails_all_trunks_at_the_start_can_be_mended_and_the_whole_field_resumed():
    policy = anchored(100, num_lrs=3)
    policy.failed("t00", "no such data set")
    policy.failed("t01", "no such data set")
    with pytest.raises(AutoLRSError, match="no such data set"):
        policy.failed("t02", "no such data set")
    restored = anchored(100, num_lrs=3)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert [segment.arm for segment in restored.wanted()] == ["t00", "t01", "t02"]


def test_a_trunk_restarted_from_an_older_checkpoint_goes_over_its_rungs_again_harmlessly():
    policy = anchored(1000, num_lrs=2, concurrency=2)
    for i in range(2):
        for step in (20, 40):
            policy.report(f"t{i:02d}", Point(step, 1.0 + 1e-3 * i))
            policy.saved(f"t{i:02d}", step, f"t{i:02d}@{step}")
    before, decided = dict(policy.trunks[0].scores), policy.decided
    policy.drain_events()
    for step in (10, 20, 30):
        assert policy.report("t00", Point(step, 50.0)) in (Verdict.CONTINUE, Verdict.SAVE)
        policy.saved("t00", step, "again")
    assert (policy.trunks[0].scores, policy.decided, policy.trunks[0].step) == (before, decided, 40)
    assert policy.trunks[0].checkpoint == "t00@40"
    assert [event for event in policy.drain_events() if event["event"] in ("rung", "decision", "commit")] == []


def test_a_rung_passed_again_after_a_lost_checkpoint_is_not_scored_twice():
    whole = Simulation(anchored()).run()
    simulation = Simulation(anchored())
    while simulation.policy.decided < 3:
        simulation.act()
    trunk = next(trunk for trunk in simulation.policy.trunks if trunk.status == "open" and trunk.previous)
    index = simulation.policy.trunks.index(trunk)
    scores = dict(trunk.scores)
    simulation.interrupt(anchored())
    simulation.policy.lost(trunk.checkpoint)
    simulation.run()
    again = simulation.policy.trunks[index].scores
    assert {step: again[step] for step in scores} == scores
    assert simulation.of("done")[0]["lr"] == whole.of("done")[0]["lr"]
    assert len(simulation.of("rung")) == len({(event["arm"], event["step"]) for event in simulation.of("rung")})


def test_both_checkpoints_lost_send_a_trunk_back_to_the_start():
    policy = anchored(1000, num_lrs=2, concurrency=2)
    for step in (20, 40):
        policy.report("t00", Point(step, 1.0))
        policy.saved("t00", step, f"t00@{step}")
    policy.lost("t00@20")
    policy.lost("t00@40")
    assert (policy.trunks[0].step, policy.trunks[0].checkpoint, policy.checkpoints()) == (0, None, set())
    assert {segment.start for segment in policy.wanted()} == {0}


def test_a_lost_end_state_of_the_run_is_trained_again():
    simulation = Simulation(anchored()).run()
    (won,) = [trunk for trunk in simulation.policy.trunks if trunk.status == "won"]
    loss = won.saved_loss
    simulation.policy.lost(won.checkpoint)
    assert not simulation.policy.done
    simulation.run()
    assert (simulation.of("done")[-1]["lr"], simulation.of("done")[-1]["loss"]) == (won.lr, loss)


@pytest.mark.parametrize(("slots", "options"), [(1, {}), (3, {}), (1, {"infill": 3}), (8, {"infill": 2, "reports": 7}),
                                                (1, {"branches": 2}), (4, {"branches": 2})])  # fmt: skip
def test_a_race_interrupted_anywhere_and_restored_makes_the_same_decisions(slots, options):
    def new():
        return anchored(concurrency=slots, **options)

    whole = Simulation(new(), slots).run()
    rng = np.random.default_rng(1)
    for _ in range(6):
        cut = Simulation(new(), slots, order=np.random.default_rng(rng.integers(99)))
        points = set(rng.integers(0, len(whole.verdicts), size=5).tolist())
        for action in range(10_000):
            if cut.policy.done:
                break
            if action in points:
                cut.interrupt(new())
            cut.act()
        cut.events += cut.policy.drain_events()
        assert cut.of("decision") == whole.of("decision")
        assert cut.of("done")[0]["lr"] == whole.of("done")[0]["lr"]
        assert cut.of("done")[0]["loss"] == whole.of("done")[0]["loss"]
        rungs = {(event["arm"], event["step"]): event["score"] for event in whole.of("rung")}
        mine = {(event["arm"], event["step"]): event["score"] for event in cut.of("rung")}
        assert all(mine[key] == rungs[key] for key in mine.keys() & rungs.keys())


def test_the_checkpoints_kept_are_two_a_trunk_at_most_and_one_trunks_at_the_end():
    simulation = Simulation(anchored())  # which fails where one is missing
    while not simulation.policy.done:
        simulation.act()
        alive = [trunk for trunk in simulation.policy.trunks if trunk.status in ("open", "won")]
        assert len(simulation.store) <= 2 * len(alive)
    (won,) = [trunk for trunk in simulation.policy.trunks if trunk.status == "won"]
    assert simulation.store[won.checkpoint].step == 200


def test_a_trainable_that_can_save_only_now_and_then_still_gets_to_the_end():
    """Function trainables save what they attach to a report; here every third report, and not at the rungs."""
    counter = iter(range(10**9))
    simulation = Simulation(anchored(), can_save=lambda arm, step: step >= 200 or next(counter) % 3 == 2)
    simulation.run(limit=20_000)
    assert simulation.of("done")[0]["step"] == 200


def test_a_trainable_that_never_saves_ends_the_run_with_the_mend():
    policy = anchored(100, num_lrs=1)
    for step in (2, 50, 100, 150, 199):
        assert policy.report("t00", Point(step, 1.0), can_save=False) is Verdict.CONTINUE
    with pytest.raises(AutoLRSError, match=r"step 200 of 100 without a checkpoint since step 0.*Pass checkpoint="):
        policy.report("t00", Point(200, 1.0), can_save=False)


def test_a_trainable_that_ignores_the_learning_rate_is_found_out():
    with pytest.raises(AutoLRSError, match=r"does not use config\[\"lr\"\]"):
        Simulation(anchored(), change=lambda arm, point: Point(point.step, 1.5, 2.5, 1.5)).run()


def test_equal_scores_alone_do_not_accuse_a_trainable_whose_training_losses_differ():
    simulation = Simulation(anchored(), change=lambda arm, point: replace(point, loss=-1.0, averaged_loss=-1.0))
    assert simulation.run().policy.done


def test_the_race_finds_a_good_learning_rate_and_trains_it_once():
    simulation = Simulation(anchored(400, num_lrs=12, finalists=1)).run()
    done = simulation.of("done")[0]
    full = {}
    for trunk in simulation.policy.trunks:
        alone = simulation.toy.train(400, lambda t, lr=trunk.lr: lr * envelope_factor("quadratic", t, 400))
        full[trunk.lr] = alone.loss
    assert done["loss"] == full[done["lr"]]  # the winning trunk is the run: no step of it was trained otherwise
    assert done["loss"] <= 1.3 * min(full.values())
    assert simulation.trained < 2.5 * 400


def test_progress_says_where_the_run_stands():
    policy = anchored()
    assert policy.trials_needed == 8
    assert policy.breadth == 8
    simulation = Simulation(policy).run()
    progress = simulation.policy.progress()
    assert (progress["phase"], progress["step"]) == ("done", 200)
    assert progress["lr"] == simulation.of("done")[0]["lr"]


def test_a_leader_that_the_rise_had_flattered_gives_way_to_the_lr_it_displaced():
    """At 4 steps of a rise over 20, LR 5.6 is at 1.1, ahead of all; at its full height it blows up, to finite losses."""
    simulation = Simulation(anchored(200, warmup=0.1)).run()
    assert [event["lr"] for event in simulation.of("trunk") if event["status"] == "diverged"] == pytest.approx(
        [5.6234], rel=1e-3
    )
    assert "starts again" in simulation.of("warning")[0]["message"]
    done = simulation.of("done")[0]
    assert (done["lr"], done["step"]) == (pytest.approx(1.7783, rel=1e-3), 200)
    assert done["loss"] < 0.11


def test_a_leader_that_learns_its_data_by_heart_later_on_stays():
    policy = anchored(1000, num_lrs=2, warmup=0.1)
    slow, fast = policy.trunks

    def losses(lr, step):
        return 1.4 if lr == slow.lr else 1.0 - step / 1000.0 if step <= 320 else 2.0

    drive(policy, losses)
    assert (slow.status, fast.status) == ("dropped", "won")


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
    [({}, "won"), ({"drift": 0.0}, "dropped"), ({"drift": 0.1}, "dropped"), ({"early": 0.08}, "dropped")],
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
        return 1.0 if lr == leader.lr else 1.4 if step < 240 else 1.19 if step < 320 else 1.006

    drive(policy, losses)
    kept = {e["step"]: [round(2 * math.log10(lr / leader.lr)) for lr in e["kept"]]
            for e in policy.drain_events() if e["event"] == "decision"}  # fmt: skip
    assert kept == {
        20: [-5, -4, -3, -2, -1, 0], 40: [-4, -3, -2, -1, 0], 60: [-3, -2, -1, 0], 80: [-3, -2, -1, 0],
        120: [-2, -1, 0], 160: [-2, -1, 0], 240: [-1, 0], 320: [0], 500: [0], 750: [0],
    }  # fmt: skip


def test_past_early_one_report_a_boundary_is_asked_for():
    policy = anchored(1000, early=0.32, reports=2, commits=2)
    segment, steps = policy.wanted()[0], [0]
    while steps[-1] < 1000:
        steps.append(next_report(segment, steps[-1]))
    assert [step for step in steps if step > 160] == [200, 240, 280, 320, 500, 750, 1000]
