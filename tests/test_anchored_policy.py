"""AnchoredPolicy: who trains when, what is read at the rungs, longer runs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from autolrs_ray.core.envelopes import ENVELOPES, envelope_factor, lr_factor
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict
from autolrs_ray.core.race.plan import RUNGS, RacePlan
from autolrs_ray.core.race.readings import untrained_by
from autolrs_ray.core.race.rule import Reading
from autolrs_ray.core.segments import next_report
from autolrs_ray.driver.reports import ReportKeys, point_of
from tests.races import anchored, drive, start
from tests.simulation import Simulation

# -- what is read ------------------------------------------------------------------------------------------------------


def test_the_rungs_are_those_measured_and_the_last_is_the_end():
    plan = make_policy("anchored", 1000).plan
    assert plan.fractions == RUNGS
    assert [step / 1000 for step in plan.steps] == list(RUNGS)
    assert (plan.rise, plan.settled, plan.close, plan.patience) == (0.2, 0.3, 0.04, 0)
    assert make_policy("anchored", 1000, warmup=0.1).plan.rise == 0.1


def test_fractions_that_fall_on_one_step_are_one_rung():
    plan = RacePlan.of(10)
    assert plan.steps == (1, 2, 3, 4, 5, 6, 8, 10)
    assert plan.fractions == (0.12, 0.24, 0.32, 0.4, 0.5, 0.64, 0.8, 1.0)
    assert RacePlan.of(2).steps == (1, 2)
    with pytest.raises(ValueError, match="end at 1"):
        RacePlan.of(10, (0.1, 0.5))


@pytest.mark.parametrize("reports", [1, 2, 3, 7, 20, 60])
def test_rungs_are_steps_at_which_a_trainable_reports(reports):
    """An epoch a report, say: none is compared by what was measured elsewhere, and the walk still finds its way."""
    every = 1000 // reports
    simulation = Simulation(anchored(1000), every=every)

    def losses(arm, point):
        lr = simulation.running[arm][0].lr
        return Point(point.step, 3.0 - min(point.step / 500, 1.0) + 0.1 * abs(math.log10(lr / 0.2)))

    simulation.change = losses
    while not simulation.policy.done:
        simulation.act()
        if not simulation.running:
            simulation.interrupt(anchored(1000))  # the plan is kept
    policy = simulation.policy
    assert policy.plan.steps == tuple(
        sorted({min(1000, -(-step // every) * every) for step in RacePlan.of(1000).steps})
    )
    assert all(set(trunk.readings) <= set(policy.plan.fractions) for trunk in policy.trunks)
    winner = next(trunk for trunk in policy.trunks if trunk.status == "won")
    assert winner.lr == min((trunk.lr for trunk in policy.trunks), key=lambda lr: abs(math.log(lr / 0.2)))


@pytest.mark.parametrize("total", [7, 76, 900])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_rungs_stay_where_they_are_for_whoever_reports_at_them(total, warmup):
    policy = anchored(total, warmup=warmup)
    plan = policy.plan
    simulation = Simulation(policy)
    simulation.run()
    assert policy.plan is plan


def test_the_smallest_lr_says_what_an_untrained_model_reads():
    policy = anchored(1000)
    baseline, largest = policy.wanted()
    assert (baseline.arm, largest.arm) == ("t00", "t07")
    steps = [0]
    while steps[-1] < 30:
        steps.append(next_report(baseline, steps[-1]))
    assert steps == [0, 5, 10, 15, 20, 30]
    assert next_report(largest, 0) == 20
    for step, loss, train in ((5, 2.0, 1.9), (10, 2.1, 2.1), (15, 1.9, 2.0), (20, 1.8, 2.0)):
        policy.report("t00", Point(step, loss, train))
    assert policy.race.baseline.untrained.score == 2.0
    assert policy.race.baseline.untrained.train == pytest.approx(2.0)
    assert policy.race.baseline.untrained.sampling is None  # the size of the validation data was not reported
    assert policy.race.baseline.untrained.noise == pytest.approx(3.18 * math.sqrt(0.02 / 3) * math.sqrt(1.25))


def test_noise_is_that_of_means_over_quarters_however_often_a_trainable_reports():
    rng = np.random.default_rng(0)
    losses = [Point(step, 1.0, float(loss)) for step, loss in enumerate(rng.normal(1.0, 0.1, 400), start=1)]
    assert 0.01 < untrained_by(losses).noise < 0.06  # means over 100 steps, not single ones
    known = untrained_by([replace(point, val_batches=25.0) for point in losses])
    assert known.sampling == pytest.approx(2.0 * known.noise)  # a quarter of the rows of a part
    assert untrained_by(losses[:3]).noise == 0.0  # too few to tell
    late = [Point(step, 1.0, loss) for step, loss in ((16, 2.58), (31, 2.57), (47, 2.52), (62, 2.49))]
    assert untrained_by(late).noise < 0.2  # steps that four does not divide make four parts, too
    assert untrained_by([Point(1, 3.0)]).train is None


@pytest.mark.parametrize(
    ("raw", "averaged", "score"), [(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (3.0, None, 3.0), (2.0, 0.5, 0.5)]
)
def test_the_score_is_of_raw_or_averaged_weights_whichever_are_better(raw, averaged, score):
    policy = anchored(100, num_lrs=2)
    policy.report("t01", Point(2, raw, None, averaged))
    assert policy.trunks[1].readings == {0.02: Reading(score)}


def test_a_reading_s_training_loss_is_the_mean_per_step_since_the_rung_before():
    """Also for a trial that goes on, restored, from a checkpoint between two rungs."""
    points = [Point(20, 1.0, 5.0), Point(25, 1.0, 4.0), Point(30, 1.0, 2.0), Point(36, 1.0, 3.0), Point(40, 1.0, 1.0)]
    for restored in (False, True):
        policy = anchored(1000, num_lrs=2)
        for point in points:
            policy.report("t01", point)
            if point.step in (20, 36):
                policy.saved("t01", point.step, f"t01@{point.step}")
            if point.step == 36 and restored:
                state, policy = policy.state_dict(), anchored(1000, num_lrs=2)
                policy.load_state_dict(state)
        assert [reading.train for reading in policy.trunks[1].readings.values()] == [5.0, 3.0, pytest.approx(2.2)]


# -- who trains when ---------------------------------------------------------------------------------------------------


def best_at(lr):
    """Losses of a race in which the LR nearest to `lr` learns fastest and most."""
    return lambda x, step: 3.0 - (2.0 - 0.2 * abs(math.log(x / lr))) * min(1.0, step / 400)


def test_the_walk_goes_down_from_the_largest_to_one_below_the_best():
    policy = anchored(1000, num_lrs=8)
    best = policy.trunks[4]
    drive(policy, best_at(best.lr))
    assert [trunk.status for trunk in policy.trunks] == [
        "dropped", "untried", "untried", "dropped", "won", "dropped", "dropped", "dropped",
    ]  # fmt: skip
    assert max(policy.trunks[0].readings) == 0.06  # until it has been read four times
    statuses = [(e["probe"], e["status"]) for e in policy.drain_events() if e["event"] == "trunk"]
    assert [probe for probe, status in statuses if status == "open"] == [0, 7, 6, 5, 4, 3]


def test_no_rung_is_decided_before_all_in_play_have_passed_it():
    policy = anchored(1000, num_lrs=3, concurrency=3, run_ahead=False)
    assert [segment.arm for segment in policy.wanted()] == ["t00", "t02"]
    policy.issue("t00"), policy.issue("t02")
    start(policy)
    assert policy.report("t02", Point(20, 1.0)) is Verdict.PAUSE
    assert policy.race.decided == 0
    assert [segment.arm for segment in policy.wanted()] == ["t01"]
    policy.issue("t01")
    assert policy.report("t01", Point(20, 2.0)) is Verdict.SAVE
    assert policy.race.decided == 1


def test_free_slots_run_the_next_lrs_below_ahead_nearest_first_and_give_way():
    policy = anchored(1000, concurrency=4)
    assert [segment.arm for segment in policy.wanted()] == ["t00", "t07", "t06", "t05"]
    for arm in ("t00", "t07", "t06", "t05"):
        policy.issue(arm)
    assert policy.wanted() == []
    for step in (20, 30, 40, 60, 80, 100):
        assert policy.report("t05", Point(step, 2.0)) is Verdict.SAVE
        policy.saved("t05", step, f"t05@{step}")
    assert policy.report("t05", Point(120, 2.0)) is Verdict.PAUSE
    policy.saved("t05", 120, "t05@120")
    policy.withdraw("t05")
    assert policy.wanted() == []  # the others are not the nearest
    assert [segment.arm for segment in anchored(1000, concurrency=1).wanted()] == ["t00", "t07"]
    assert policy.breadth == 3


@pytest.mark.parametrize("every", [0, 7, 13, 40])
@pytest.mark.parametrize("slots", range(2, 13))
@pytest.mark.parametrize("options", [{}, {"run_ahead": False}, {"envelope": "wsd"}, {"num_lrs": 12, "warmup": 0.0}])
def test_decisions_do_not_depend_on_the_order_of_arrival_or_the_number_of_slots(every, slots, options):
    runs = [Simulation(anchored(concurrency=1, **options), every=every).run()]
    runs += [
        Simulation(anchored(concurrency=slots, **options), slots, every, np.random.default_rng(seed)).run()
        for seed in range(2)
    ]

    def outcome(run):
        (done,) = run.of("done")
        winner = next(trunk for trunk in run.policy.trunks if trunk.status == "won")
        return (
            run.of("decision"),
            done["lr"],
            winner.readings,
            run.store[done["checkpoint"]],
        )  # the weights, to the last digit

    expected, *others = map(outcome, runs)
    assert all(other == expected for other in others)
    order = [[event["arm"] for event in run.of("rung")] for run in runs]
    assert order[1] != order[2] or slots == 2 or every == 40


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("scale", "shift"), [(1e-9, 0.0), (1e6, 0.0), (1.0, 1e3), (1.0, -1e6), (1e6, -1e6), (0.5, -7.0)]
)
def test_decisions_are_the_same_in_any_unit_from_any_zero_and_for_the_highest_of_the_negated(scale, shift, sign):
    keys = ReportKeys("step", "score", "train_loss", "averaged")

    def change(arm, point):
        told = {"score": sign * (scale * point.loss + shift), "averaged": sign * (scale * point.averaged_loss + shift)}
        segment = simulation.running[arm][0]
        lr = {"lr": segment.lr_at(point.step - 1)}
        report = {"step": point.step, "train_loss": scale * point.train_loss + shift, **told, **lr}
        return point_of(report, segment, keys, sign, None)

    simulation, plain = Simulation(anchored(400, num_lrs=12)), Simulation(anchored(400, num_lrs=12)).run()
    simulation.change = change
    simulation.run()
    for run in (simulation, plain):
        assert len(run.of("decision")) == len(RUNGS)
    said = [
        [(e["step"], e["leader"], e["kept"], e["judged"]) for e in run.of("decision")] for run in (simulation, plain)
    ]
    assert said[0] == said[1]
    assert simulation.of("done")[0]["lr"] == plain.of("done")[0]["lr"]


@pytest.mark.parametrize("slots", [1, 2, 3, 12])
def test_a_race_costs_no_more_than_was_said(slots):
    simulation = Simulation(anchored(1000, concurrency=slots, num_lrs=12, warmup=0.2), slots=slots).run()
    compute, wall_clock = simulation.policy.cost(slots)
    assert simulation.trained <= 1000 * compute
    assert 1.0 <= wall_clock <= compute


def test_every_segment_starts_at_the_trunks_last_checkpoint_under_the_envelope():
    policy = anchored(1000, num_lrs=2, concurrency=2, commits=20)
    start(policy)
    policy.report("t01", Point(20, 1.0))
    policy.saved("t01", 20, "t01@20")
    segment = next(segment for segment in policy.wanted() if segment.arm == "t01")
    assert (segment.start, segment.source, segment.boundaries[:4]) == (20, "t01@20", (30, 40, 50, 60))
    assert segment.end == 1000
    assert segment.lr_at(500) == pytest.approx(0.75 * policy.trunks[1].lr)


def test_who_has_won_is_chosen_on_the_final_score():
    """The lower LR is within the margin all the way and overtakes at the end."""
    policy = anchored(1000, num_lrs=2)
    low, high = (trunk.lr for trunk in policy.trunks)
    drive(policy, lambda lr, step: 3.0 - 2.0 * step / 1000 + (0.001 if lr == low else 0.0) * (1 if step < 1000 else -1))
    assert [trunk.status for trunk in policy.trunks] == ["won", "dropped"]
    (done,) = [event for event in policy.drain_events() if event["event"] == "done"]
    assert (done["lr"], done["loss"], done["step"]) == (low, pytest.approx(0.999), 1000)
    assert low < high


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
    alone = simulation.toy.train(500, lambda t: before["lr"] * lr_factor("wsd", t, 500, 20))
    done = simulation.of("done")[-1]
    assert (done["lr"], done["loss"], done["step"]) == (before["lr"], alone.loss, 500)
    assert {segment.warmup_steps for segment in simulation.started} == {20}  # of the run as it began
    assert interrupted or simulation.trained - trained == 500 - 80


def test_a_run_that_cannot_be_extended_says_why():
    with pytest.raises(ValueError, match=r"'quadratic' falls from the start: only wsd and constant"):
        Simulation(anchored()).run().policy.extend(400)
    with pytest.raises(ValueError, match="2 learning rates are still in the race"):
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


@pytest.mark.parametrize("total", [2, 3, 7, 20])
def test_short_runs_end_too(total):
    assert Simulation(anchored(total)).run().policy.done
