"""PaperPolicy: what a result means, whatever happens on the way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from autolrs_ray.core.paper import surrogate
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from autolrs_ray.core.segments import next_report
from tests.simulation import Simulation, Toy, diverging

OPTIONS = dict(stage_steps=20, max_stage_steps=40, probe_steps=5, num_lrs=4)


def paper(total_steps=100, lr_interval=(1e-3, 1.0), seed=3, concurrency=1, **options):
    return make_policy("paper", total_steps, lr_interval, seed, concurrency, **{**OPTIONS, **options})


def finish_probe(policy, segment, losses, train_losses=None, can_save=True):
    """Report `losses` at the steps where `segment` wants reports; return the last verdict."""
    step = segment.start
    for i, loss in enumerate(losses):
        step = next_report(segment, step)
        train = train_losses[i] if train_losses is not None else None
        verdict = policy.report(segment.arm, Point(step, loss, train), can_save)
    return verdict


def decaying(level, n=5):
    return [level + math.exp(-i) for i in range(n)]


# -- order and concurrency ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 2, 3, 5, 10])
def test_the_same_results_give_the_same_proposals_in_whatever_order_they_arrive(q):
    def run(order):
        policy = paper(concurrency=q, num_lrs=10, kappa=2.0, promote=False)
        return Simulation(policy, slots=q, order=order).run()

    in_order = run(None)
    expected = {event["arm"]: event["lr"] for event in in_order.of("proposal")}
    assert len(expected) == 10 * len(in_order.of("stage"))
    for seed in range(3):
        shuffled = run(np.random.default_rng(seed))
        assert {event["arm"]: event["lr"] for event in shuffled.of("proposal")} == expected
        assert shuffled.of("choice", "commit", "done")[-1]["loss"] == in_order.of("done")[0]["loss"]
        finished = [event["arm"] for event in shuffled.of("probe")]
        assert q == 1 or finished != [event["arm"] for event in in_order.of("probe")]  # it was another order


def test_probes_come_in_rounds_of_as_many_as_run_at_once():
    """q = 2: the third proposal waits for both probes of the first round, and knows of both."""
    policy = paper(concurrency=2)
    first, second = policy.wanted()
    policy.issue(first.arm), policy.issue(second.arm)
    finish_probe(policy, second, decaying(1.0))
    assert policy.wanted() == []
    finish_probe(policy, first, decaying(2.0))
    assert len(policy.wanted()) == 2


@pytest.mark.parametrize(("num_lrs", "at_once"), [(1, 1), (4, 4), (6, 4), (10, 5), (13, 7)])
def test_however_many_slots_half_of_a_stages_learning_rates_know_of_the_others(num_lrs, at_once):
    """Or all but the grid that it starts with."""
    policy = paper(concurrency=99, num_lrs=num_lrs)
    assert len(policy.wanted()) == policy.breadth == at_once


def test_slots_that_turn_up_late_leave_the_proposals_made_before_as_they_are():
    policy = paper()
    (first,) = policy.wanted()
    policy.set_concurrency(3)
    segments = policy.wanted()
    assert segments[0] == first
    assert len(segments) == 3
    policy.set_concurrency(1)  # the stage has begun with 3
    assert len(policy.wanted()) == 3


# -- the saved state ---------------------------------------------------------------------------------------------------


def without_saved(events):
    """A probe interrupted between its last report and its checkpoint is not promoted: the one trace it may leave."""
    return [event for event in events if event["event"] != "saved"]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 7, "warmup_lr": 0.1}, {"initial": "grid", "promote": False}])
def test_a_run_interrupted_anywhere_and_restored_has_the_very_same_events(options):
    whole = Simulation(paper(**options)).run()
    rng = np.random.default_rng(0)
    for _ in range(12):
        cut = Simulation(paper(**options))
        points = set(rng.integers(0, whole.trained // 2, size=4).tolist())
        for action in range(10_000):
            if cut.policy.done:
                break
            if action in points:
                cut.interrupt(paper(**options))
            cut.act()
        assert without_saved(cut.events) == without_saved(whole.events[: len(cut.events)])
        assert cut.events[-1]["event"] == "done"
        assert cut.trained >= whole.trained


def test_the_state_between_a_probes_end_and_its_checkpoint_restores_without_the_promotion():
    policy = paper(num_lrs=1)
    (segment,) = policy.wanted()
    assert finish_probe(policy, segment, decaying(1.0)) is Verdict.FINISH_AND_SAVE
    restored = paper(num_lrs=1)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    policy.saved(segment.arm, 5, "p")
    assert (policy.wanted()[0].start, restored.wanted()[0].start) == (5, 0)
    assert policy.wanted()[0].lr == restored.wanted()[0].lr


def test_a_state_of_another_policy_is_refused():
    anchored = make_policy("anchored", 100)
    with pytest.raises(ValueError, match="belongs to policy 'anchored'"):
        paper().load_state_dict(anchored.state_dict())
    with pytest.raises(ValueError, match="belongs to policy 'paper'"):
        anchored.load_state_dict(paper().state_dict())


# -- divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_probe_with_a_loss_that_is_not_finite_ends_at_once_and_nothing_above_it_is_tried_again(bad):
    policy = paper(num_lrs=6, initial="grid", lr_interval=(1e-3, 10.0))
    tried = []
    while policy.phase == "search":
        (segment,) = policy.wanted()
        tried.append(segment.lr)
        if segment.lr > 0.05:
            assert policy.report(segment.arm, Point(1, bad)) is Verdict.FINISH
            assert policy.report(segment.arm, Point(2, bad)) is Verdict.FINISH  # one report too many does no harm
        else:
            finish_probe(policy, segment, decaying(1.0 + tried[-1]))
    bound = math.inf
    for lr in tried:
        assert lr < bound
        bound = min(bound, lr) if lr > 0.05 else bound
    assert {probe.status for probe in policy.probes} == {"done", "diverged"}
    assert policy.probes[policy.chosen].lr <= 0.05
    events = json.dumps(policy.drain_events(), allow_nan=False)
    assert "diverged" in events


def into_the_second_stage(loss, first_losses=(1.2, 1.5, 2.0, 8.0)):
    """A policy whose first stage began at `first_losses`, one per probe, and ended at `loss`."""
    policy = paper(initial="grid", promote=False)
    for i, first in enumerate(first_losses):
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [first, *decaying(1.0 + i, 4)])
    policy.report("main", Point(20, loss))
    policy.saved("main", 20, "main@20")
    return policy


def statuses(policy, *levels):
    for level in levels:
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [level] * 10)
    return [probe.status for probe in policy.probes[: len(levels)]]


@pytest.mark.parametrize(
    ("start", "yardstick"),
    [
        (3.0, 3.0),  # the stage started above the run's first losses
        (1e-6, 2.0),  # a well-trained model: every harmless probe ends at many times 1e-6
    ],
)
def test_a_probe_far_above_both_the_stages_start_and_the_runs_first_losses_has_diverged(start, yardstick):
    policy = into_the_second_stage(start)
    assert statuses(policy, 3.9 * yardstick, 4.1 * yardstick) == ["done", "diverged"]


def test_the_first_losses_are_kept_in_the_state_and_one_from_before_that_measures_by_the_stages_start():
    state = json.loads(json.dumps(into_the_second_stage(0.1).state_dict()))
    restored, old = paper(initial="grid", promote=False), paper(initial="grid", promote=False)
    restored.load_state_dict(state)
    assert restored.first_loss == 2.0
    del state["first_loss"]
    old.load_state_dict({**state, "probes": []})
    assert [statuses(policy, 0.3, 0.5) for policy in (restored, old)] == [["done", "done"], ["done", "diverged"]]


def test_a_best_probe_that_first_rose_does_not_make_the_main_trial_diverge():
    policy = into_the_second_stage(1.0, first_losses=(50.0, 1.0, 1.0, 1.0))
    assert policy.first_loss == 50.0


def test_after_a_warm_up_the_first_loss_is_its_first():
    policy = paper(warmup_steps=8, warmup_lr=0.1)
    for step, loss in ((1, 2.0), (2, 90.0), (8, 1e-3)):  # no smaller LR to go back to: a warm-up may rise
        policy.report("main", Point(step, loss))
    policy.saved("main", 8, "main@8")
    assert statuses(policy, 7.9, 8.1) == ["done", "diverged"]


@pytest.mark.parametrize("floor", [0.0, None])
@pytest.mark.parametrize("first", [1.5, -0.5])
def test_losses_below_zero_have_a_wall_by_what_has_been_gained(floor, first):
    """A density's: from `first` to -3, so that 3 times the fall above `first` is a divergence, whatever the floor of others."""
    policy = paper(initial="grid", promote=False, floor=floor, num_lrs=4)
    while policy.phase == "search":
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [first, *decaying(-4.0 - segment.lr, 4)])
    again = [policy.report("main", Point(20, 1e6)) for _ in range(2)]  # a mere rise is trained again once
    assert again == [Verdict.ROLLBACK] * 2
    policy.report("main", Point(20, -4.0))
    policy.saved("main", 20, "main@20")
    wall = first + 3.0 * (first + 4.0)
    assert statuses(policy, wall - 0.1, wall + 0.1) == ["done", "diverged"]


def test_in_a_first_stage_of_negative_losses_an_explosion_is_one_in_whatever_order_probes_end():
    def found(order):
        policy = paper(initial="grid", floor=None, concurrency=4)
        segments = policy.wanted()
        for segment in segments:
            policy.issue(segment.arm)
        for i in order:
            finish_probe(
                policy, segments[i], [-2.0, *([-2.5 - i, -3.0 - i, -3.0 - i, -3.1 - i] if i < 3 else [40.0] * 4)]
            )
        return [(probe.status, probe.forecast) for probe in policy.probes]

    assert [status for status, _ in found((0, 1, 2, 3))] == ["done"] * 3 + ["diverged"]
    assert found((3, 2, 1, 0)) == found((3, 0, 2, 1)) == found((0, 1, 2, 3))


def test_no_accuracy_is_so_low_that_training_has_diverged():
    policy = paper(floor=None, initial="grid", promote=False)
    while policy.phase == "search":
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [-0.1, *[-2.0 * segment.lr if segment.lr > 0.01 else 0.0] * 4])
    assert [probe.status for probe in policy.probes] == ["done"] * 4
    assert policy.report("main", Point(20, 0.0)) is Verdict.ROLLBACK  # below where it began: once
    assert policy.report("main", Point(20, 0.0)) is Verdict.PAUSE


def test_a_training_loss_that_is_not_finite_is_a_divergence_though_the_validation_loss_is_fine():
    policy = paper()
    (segment,) = policy.wanted()
    finish_probe(policy, segment, decaying(1.0), [2.0, math.nan, 2.0, 2.0, 2.0])
    assert policy.probes[0].status == "diverged"


@pytest.mark.parametrize(
    ("losses", "forecast"),
    [
        ([2.0] * 5, 2.0),  # flat
        ([1.0, 1.5, 2.0, 2.5, 3.0], 2.5),  # rising: the mean of the last points
        ([3.0], 3.0),  # short
    ],
)
def test_flat_rising_and_short_series_count_as_what_they_have_shown(losses, forecast):
    policy = paper(probe_steps=len(losses))
    (segment,) = policy.wanted()
    finish_probe(policy, segment, losses)
    assert policy.probes[0].forecast == pytest.approx(forecast)


def test_when_all_probes_diverge_two_decades_lower_are_tried_and_then_the_run_ends():
    simulation = Simulation(paper(lr_interval=(0.1, 10.0)))
    simulation.change = diverging(above=0.0)(simulation)
    with pytest.raises(AutoLRSError, match=r"none of the learning rates .* finite loss: .*diverged.*Lower lr_interval"):
        simulation.run()
    tried = [segment.lr for segment in simulation.started]
    assert len(tried) == 8
    assert all(0.1 <= lr <= 10.0 for lr in tried[:4])
    assert all(0.001 <= lr <= 0.1 for lr in tried[4:])
    assert "all probes diverged" in simulation.of("warning")[0]["message"]


def test_the_lower_interval_can_save_the_stage_and_the_next_one_starts_from_the_given_interval():
    policy = paper(lr_interval=(0.1, 10.0))
    while policy.phase == "search":
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [math.nan] if segment.lr > 0.1 else decaying(segment.lr))
    assert policy.probes[policy.chosen].lr < 0.1
    assert policy.interval == (0.001, 0.1)
    policy.report("main", Point(20, 1.0))
    policy.saved("main", 20, "main@20")
    assert policy.interval == (0.1, 10.0)
    assert 0.1 <= policy.wanted()[0].lr <= 10.0


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (lambda arm, point: "fail", r"\(failed\)"),
        (lambda arm, point: Point(point.step, 1.5, 2.5), "same loss"),
        (lambda arm, point: Point(point.step, math.nan), r"\(diverged\)"),
    ],
)
def test_whoever_mends_the_cause_and_resumes_gets_the_stage_searched_anew(cause, message):
    simulation = Simulation(paper(), change=cause)
    with pytest.raises(AutoLRSError, match=message):
        simulation.run()
    restored = paper()
    restored.load_state_dict(json.loads(json.dumps(simulation.policy.state_dict())))
    mended = Simulation(restored).run()
    assert mended.policy.loss == Simulation(paper()).run().policy.loss


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failed_probe_is_left_out_and_its_learning_rate_is_not_tried_again():
    policy = paper(num_lrs=6, kappa=2.0)
    for i in range(6):
        (segment,) = policy.wanted()
        if i in (2, 3):
            policy.failed(segment.arm, "out of memory")
            policy.failed(segment.arm, "out of memory")  # booked once
        else:
            finish_probe(policy, segment, decaying(1.0 + i))
    lrs = [probe.lr for probe in policy.probes]
    assert [probe.status for probe in policy.probes] == ["done", "done", "failed", "failed", "done", "done"]
    assert min(abs(math.log(a / b)) for i, a in enumerate(lrs) for b in lrs[:i] if i in (3, 4)) > 0.05
    assert policy.chosen == 0
    warnings = [event["message"] for event in policy.drain_events() if event["event"] == "warning"]
    assert len(warnings) == 2
    assert "out of memory" in warnings[0]


def test_a_failed_main_trial_ends_the_run_with_its_last_good_checkpoint():
    simulation = Simulation(paper())
    while len(simulation.of("commit")) < 2:
        simulation.act()
    policy = simulation.policy
    with pytest.raises(AutoLRSError, match=rf"main@60#\d+ \(step {policy.step}\).*resume"):
        policy.failed("main", "killed")


def test_a_diverging_main_trial_goes_back_to_the_stages_start_with_the_next_smaller_learning_rate():
    def change(arm, point):
        lr = simulation.running[arm][0].lr
        return replace(point, loss=math.nan) if arm == "main" and lr > 0.5 * highest and point.step > 10 else None

    highest = max(probe.lr for probe in Simulation(paper(seed=5)).run().policy.probes)
    simulation = Simulation(paper(seed=5), change=change)
    while not simulation.of("commit"):
        simulation.act()
    (rollback,) = simulation.of("rollback")
    assert rollback["new_lr"] < rollback["lr"]
    retried = simulation.started[-1]
    assert (retried.arm, retried.start, retried.source, retried.lr) == ("main", 0, None, rollback["new_lr"])
    assert [verdict for _, _, verdict in simulation.verdicts].count(Verdict.ROLLBACK) == 1
    assert simulation.of("commit")[0]["lr"] == rollback["new_lr"]


@pytest.mark.parametrize("huge", [1e30, 41.0])
def test_a_main_trial_that_blows_up_to_a_finite_loss_goes_back_too(huge):
    """The first losses are 10: the wall is 40."""
    policy = paper(num_lrs=2, initial="grid", promote=False)
    for level in (2.0, 1.0):
        finish_probe(policy, policy.wanted()[0], [10.0, *decaying(level, 4)])
    lr = policy.wanted()[0].lr
    assert policy.report("main", Point(7, huge)) is Verdict.CONTINUE  # it may come down again before the stage ends
    assert policy.report("main", Point(20, huge, huge)) is Verdict.ROLLBACK
    assert policy.wanted()[0].lr < lr
    assert policy.report("main", Point(20, huge, 2.0)) is Verdict.PAUSE  # statistics of batch norm, not the weights
    assert policy.report("main", Point(20, 39.0)) is Verdict.PAUSE


def test_the_start_that_a_stage_is_measured_by_stays_until_its_end_is_durable():
    """Killed between the last report and its checkpoint, the main trial comes from where the stage began."""
    policy = into_the_second_stage(7.0)
    while policy.phase == "search":
        finish_probe(policy, policy.wanted()[0], decaying(5.0 + len(policy.probes), 10))
    policy.report("main", Point(60, 0.01))
    restored = paper(initial="grid", promote=False)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert restored.report("main", Point(60, 8.1)) is Verdict.PAUSE
    policy.saved("main", 60, "main@60")
    assert (restored.loss, policy.loss) == (7.0, 0.01)


def test_a_rollback_never_needs_a_checkpoint_that_was_allowed_to_be_deleted():
    """Probe 0 leads and is saved, probe 1 leads after it: a rollback to probe 0 starts from the stage's start."""
    policy = paper(num_lrs=2, initial="grid", lr_interval=(0.01, 1.0))
    for level in (2.0, 1.0):
        (segment,) = policy.wanted()
        assert finish_probe(policy, segment, decaying(level)) is Verdict.FINISH_AND_SAVE
        policy.saved(segment.arm, 5, segment.arm)
    assert policy.checkpoints() == {"s000p01"}
    assert policy.wanted()[0].source == "s000p01"
    assert policy.report("main", Point(7, math.nan)) is Verdict.ROLLBACK
    (segment,) = policy.wanted()
    assert (segment.start, segment.source) == (0, None)


def test_a_main_trial_that_diverges_at_every_learning_rate_ends_the_run():
    def change(arm, point):
        return replace(point, loss=math.nan) if arm == "main" else None

    with pytest.raises(AutoLRSError, match=r"the main trial diverged at step \d+ .* no smaller learning rate"):
        Simulation(paper(seed=5), change=change).run()


def test_a_diverging_warm_up_ends_the_run():
    policy = paper(warmup_steps=10, warmup_lr=5.0)
    with pytest.raises(AutoLRSError, match=r"diverged at step 3 with lr=5"):
        policy.report("main", Point(3, math.inf))


def test_a_main_trial_that_never_saves_ends_the_run_with_the_mend():
    policy = paper(num_lrs=1)
    finish_probe(policy, policy.wanted()[0], decaying(1.0), can_save=False)
    for step in (20, 30, 39):
        assert policy.report("main", Point(step, 1.0), can_save=False) is Verdict.CONTINUE
    with pytest.raises(AutoLRSError, match=r"step 40 without a checkpoint.*Pass checkpoint="):
        policy.report("main", Point(40, 1.0), can_save=False)


def test_a_stage_ends_where_the_main_trial_could_save_it():
    policy = paper(num_lrs=1)
    finish_probe(policy, policy.wanted()[0], decaying(1.0), can_save=False)
    assert policy.report("main", Point(20, 1.0), can_save=False) is Verdict.CONTINUE
    assert policy.report("main", Point(23, 1.0), can_save=True) is Verdict.PAUSE
    policy.saved("main", 23, "c")
    assert (policy.stage.start, policy.stage.steps) == (23, 40)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_exactly_the_checkpoints_that_are_still_needed_are_kept():
    simulation = Simulation(paper())  # which fails where one is missing
    most = 0
    while not simulation.policy.done:
        simulation.act()
        most = max(most, len(simulation.store))
    assert most == 3  # the stage's start, the one before it, the leading probe's end
    assert simulation.policy.checkpoint in simulation.store


def test_a_lost_checkpoint_costs_a_stage_and_not_the_run():
    def losing():
        simulation = Simulation(paper(promote=False))
        while len(simulation.of("commit")) < 2:
            simulation.act()
        simulation.interrupt(paper(promote=False))
        simulation.policy.lost("no such path")
        simulation.policy.lost(simulation.policy.checkpoint)
        return simulation

    whole = Simulation(paper(promote=False)).run()
    simulation = losing()
    (segment,) = simulation.policy.wanted()
    second = whole.of("commit")[1]
    assert (segment.arm, segment.start, segment.end, segment.lr) == ("main", 20, 60, second["lr"])
    simulation.run()
    assert simulation.policy.loss == whole.policy.loss
    rows = {(row["start"], row["end"]): row["lr"] for row in simulation.of("commit")}
    assert rows == {(row["start"], row["end"]): row["lr"] for row in whole.of("commit")}


@pytest.mark.parametrize("older_first", [True, False])
@pytest.mark.parametrize("warmup", [0, 5])
def test_two_lost_checkpoints_send_the_run_back_to_the_start(older_first, warmup):
    options = dict(warmup_steps=warmup, warmup_lr=0.1 if warmup else 0.0)
    simulation = Simulation(paper(**options))
    while len(simulation.of("commit")) < 3:
        simulation.act()
    policy = simulation.policy
    lost = [policy.previous["checkpoint"], policy.checkpoint]
    for path in lost if older_first else lost[::-1]:
        policy.lost(path)
    assert (policy.step, policy.checkpoint, policy.checkpoints()) == (0, None, set())
    assert policy.phase == ("warmup" if warmup else "search")
    simulation.running.clear()
    simulation.store.clear()
    assert simulation.run().policy.loss == Simulation(paper(**options)).run().policy.loss


def test_a_lost_end_state_of_the_run_is_trained_again():
    simulation = Simulation(paper()).run()
    loss = simulation.policy.loss
    simulation.policy.lost(simulation.policy.checkpoint)
    assert not simulation.policy.done
    assert simulation.run().policy.loss == loss


def test_a_lost_probe_checkpoint_is_trained_again_by_the_main_trial():
    policy = paper(num_lrs=1)
    (segment,) = policy.wanted()
    finish_probe(policy, segment, decaying(1.0))
    policy.saved(segment.arm, 5, "p")
    policy.lost("p")
    (segment,) = policy.wanted()
    assert (segment.start, segment.source) == (0, None)


# -- series, warm-up, options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_stage_steps", "by_training"), [(40, 2), (20, 1), (80, 3)])
def test_probes_are_ranked_by_training_loss_up_to_the_first_stage_of_tau_max_and_by_validation_loss_after(
    max_stage_steps, by_training
):
    """The authors' rule; tau is 20, 40, 80, ... up to tau_max."""
    simulation = Simulation(paper(total_steps=300, max_stage_steps=max_stage_steps)).run()
    series = {event["stage"]: event["series"] for event in simulation.of("probe")}
    assert len(series) > by_training
    assert all(found == ("training" if stage < by_training else "validation") for stage, found in series.items())


@pytest.mark.parametrize("series", ["authors", "validation"])
def test_the_choice_follows_the_series_that_counts(series):
    policy = paper(num_lrs=2, initial="grid", series=series)
    for level in (1.0, 2.0):  # the first has the better training, the second the better validation loss
        (segment,) = policy.wanted()
        finish_probe(policy, segment, decaying(3.0 - level), decaying(level))
    assert policy.chosen == (0 if series == "authors" else 1)


def test_validation_losses_serve_where_no_training_loss_is_reported():
    policy = paper()
    (segment,) = policy.wanted()
    finish_probe(policy, segment, decaying(1.0))
    assert [e["series"] for e in policy.drain_events() if e["event"] == "probe"] == ["validation"]


def test_the_warm_up_rises_linearly_and_is_not_searched():
    policy = paper(warmup_steps=10, warmup_lr=0.5)
    (segment,) = policy.wanted()
    assert (segment.arm, segment.start, segment.end) == ("main", 0, 10)
    assert [segment.lr_at(step) for step in range(10)] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    simulation = Simulation(policy).run()
    rows = simulation.of("commit")
    assert [(row["start"], row["end"], row["warmup"]) for row in rows[:2]] == [(0, 10, True), (10, 30, False)]
    assert all(event["stage"] >= 0 for event in simulation.of("probe"))


def test_the_first_learning_rate_depends_on_seed_and_stage_only():
    first = {
        seed: [e["lr"] for e in Simulation(paper(seed=seed, initial="random")).run().of("proposal")][::4]
        for seed in (1, 1, 2)
    }
    assert first[1][0] != first[1][1]
    assert first[1][0] != first[2][0]
    assert [e["lr"] for e in Simulation(paper(seed=1, initial="random", kappa=9.0)).run().of("proposal")][::4] == first[
        1
    ]


def test_the_grid_start_tries_four_bin_centres_first():
    policy = paper(num_lrs=6, initial="grid", lr_interval=(1e-4, 1.0))
    while policy.phase == "search":
        finish_probe(policy, policy.wanted()[0], decaying(1.0))
        policy.probes[-1].train_loss = float(len(policy.probes))  # not all the same
    assert [round(math.log10(probe.lr), 9) for probe in policy.probes[:4]] == [-3.5, -2.5, -1.5, -0.5]


@pytest.mark.parametrize("fit", ["map", "mll"])
def test_both_fits_find_a_good_learning_rate(fit):
    simulation = Simulation(paper(total_steps=20, fit=fit, num_lrs=8, kappa=2.0, initial="grid", stage_steps=20)).run()
    forecasts = [probe.forecast for probe in simulation.policy.probes]
    assert min(forecasts[4:]) < min(forecasts[:4])  # better than the grid it started from


def test_kappa_trades_exploration_for_exploitation():
    def spread(kappa):
        policy = paper(num_lrs=12, initial="grid", kappa=kappa, lr_interval=(1e-3, 10.0))
        while policy.phase == "search":
            (segment,) = policy.wanted()
            finish_probe(policy, segment, [1.0 + math.log10(segment.lr / 0.1) ** 2] * 5)
        return float(np.std([math.log10(probe.lr) for probe in policy.probes[4:]]))

    assert spread(0.5) < 0.5 * spread(1000.0)


def test_an_envelope_multiplies_the_stages_learning_rate():
    simulation = Simulation(paper(envelope="linear")).run()
    probe = simulation.started[0]
    assert probe.lr_at(0) == probe.lr
    assert probe.lr_at(50) == pytest.approx(0.5 * probe.lr)


# -- a trainable that ignores the LR, a surrogate that fails -----------------------------------------------------------


def test_a_trainable_that_ignores_the_learning_rate_is_found_out():
    with pytest.raises(AutoLRSError, match=r"same loss .* does not use config\[\"lr\"\]"):
        Simulation(paper(), change=lambda arm, point: Point(point.step, 1.5, 2.5)).run()


def test_equal_scores_alone_do_not_accuse_a_trainable_whose_training_losses_differ():
    """An accuracy may tie in earnest."""
    simulation = Simulation(paper(floor=None), change=lambda arm, point: replace(point, loss=-1.0))
    assert simulation.run().policy.done


@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_a_score_that_never_moves_accuses_nobody_and_one_that_does_is_evidence_enough(policy):
    """An accuracy at chance level, without training losses, against one that moves alike at every LR."""
    new = paper if policy == "paper" else lambda: make_policy("anchored", 200, num_lrs=5)
    chance = Simulation(new(), change=lambda arm, point: Point(point.step, 0.9))
    assert chance.run().policy.done
    with pytest.raises(AutoLRSError, match="does not use config"):
        Simulation(new(), change=lambda arm, point: Point(point.step, 0.9 - 1e-4 * point.step)).run()


@pytest.mark.parametrize("policy", ["paper", "anchored"])
@pytest.mark.parametrize(("score", "train_loss"), [(0.0, None), (0.0, 0.0), (-1.0, None)])
def test_a_score_that_can_get_no_better_accuses_nobody(policy, score, train_loss):
    """A toy that is solved exactly, an accuracy of 1: reached at every LR, after other scores at the start."""
    new = paper if policy == "paper" else lambda: make_policy("anchored", 200, num_lrs=5)
    solved = Simulation(
        new(), change=lambda arm, point: Point(point.step, score if point.step > 3 else 0.5, train_loss)
    )
    assert solved.run().policy.done
    if train_loss == 0.0:
        with pytest.raises(AutoLRSError, match="does not use config"):
            Simulation(new(), change=lambda arm, point: Point(point.step, score, 0.3)).run()


def test_two_learning_rates_with_equal_losses_may_be_chance():
    policy = paper(num_lrs=2)
    for _ in range(2):
        finish_probe(policy, policy.wanted()[0], [1.5] * 5)
    assert policy.phase == "train"


def test_a_surrogate_that_fails_every_second_time_costs_warnings_and_not_the_run(monkeypatch):
    calls, propose = [], surrogate.propose

    def unreliable(*args, **kwargs):
        calls.append(args)
        if len(calls) % 2:
            raise RuntimeError("cholesky: the input is not positive-definite")
        return propose(*args, **kwargs)

    monkeypatch.setattr(surrogate, "propose", unreliable)
    simulation = Simulation(paper(num_lrs=8)).run()
    warnings = simulation.of("warning")
    assert len(warnings) == (len(calls) + 1) // 2 > 0
    assert all("surrogate failed (RuntimeError: cholesky" in event["message"] for event in warnings)
    low, high = 1e-3, 1.0
    assert all(low * (1 - 1e-9) <= event["lr"] <= high * (1 + 1e-9) for event in simulation.of("proposal"))


def test_duplicates_and_stragglers_change_nothing():
    plain = Simulation(paper()).run()
    simulation = Simulation(paper())
    while not simulation.policy.done:
        simulation.act()
        arm, step, _ = simulation.verdicts[-1]
        if arm not in simulation.running:
            late = simulation.policy.report(arm, Point(step, 0.0, 0.0))
            assert late in (Verdict.FINISH, Verdict.PAUSE)
            if arm != "main":
                simulation.policy.failed(arm, "too late")
            for path in sorted(simulation.store):
                simulation.policy.saved(path.split("@")[0], simulation.store[path].step, path)
    assert simulation.events == plain.events


def test_a_restarted_probe_goes_over_old_ground_without_counting_it_twice():
    policy = paper()
    (segment,) = policy.wanted()
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (1, 3.0), (2, 2.5), (3, 2.2), (4, 2.1), (5, 2.05)):
        policy.report(segment.arm, Point(step, loss))
    (event,) = [e for e in policy.drain_events() if e["event"] == "probe"]
    assert event["steps"] == [1, 2, 3, 4, 5]
    assert event["losses"] == [3.0, 2.5, 2.2, 2.1, 2.05]


def test_a_trainable_that_reports_rarely_overshoots_and_nothing_is_lost():
    policy = paper(num_lrs=2)
    for level in (1.0, 2.0):
        (segment,) = policy.wanted()
        policy.report(segment.arm, Point(25, level))
        policy.saved(segment.arm, 25, segment.arm)
    (main,) = policy.wanted()
    assert (main.start, main.source) == (0, None)  # the winner's state lies past the stage
    policy.report("main", Point(25, 1.0))
    policy.saved("main", 25, "c")
    assert policy.stage.start == 25


@pytest.mark.parametrize("slots", [1, 3, 12])
@pytest.mark.parametrize("trouble", ["none", "rise", "divergence", "all"])
def test_a_run_costs_no_more_than_was_said_whatever_is_trained_again(slots, trouble):
    """Stages that rise once, stages that diverge as often as they may, and probes that all diverge in their first round too."""
    policy = paper(total_steps=140, num_lrs=6, concurrency=slots)
    often = {"none": 0, "rise": 1}.get(trouble, 3)

    def change(arm, point):
        lr, trained = simulation.running[arm][0].lr, policy.stage.index
        if arm == "main":
            return Point(point.step, 3.0 - trained if policy.rollbacks >= often else 4.0 if trouble == "rise" else 1e3)
        return Point(
            point.step, math.nan if trouble == "all" and not policy.rounds else 3.0 - trained - 0.01 * math.log(lr)
        )

    simulation = Simulation(policy, slots=slots)
    simulation.change = change
    simulation.run()
    stages = len(simulation.of("commit"))
    assert len(simulation.of("rollback")) == often * stages
    (compute, wall_clock), usual = policy.cost(slots), policy.usual(slots)
    assert simulation.trained <= 140 * compute
    assert usual[1] <= usual[0] < compute >= wall_clock
    if trouble == "none":
        assert simulation.trained == pytest.approx(140 * usual[0])
    if trouble == "all":  # all but the last report of each attempt, at which it is found out
        assert simulation.trained > 0.8 * 140 * compute


def test_progress_says_where_the_run_stands():
    policy = paper()
    assert {"phase", "stage", "stages", "resolved", "trials", "lr", "loss", "step", "total_steps"} <= set(
        policy.progress()
    )
    assert policy.trials_needed == 1 + 4 * policy.progress()["stages"]
    simulation = Simulation(policy).run()
    progress = simulation.policy.progress()
    assert (progress["phase"], progress["step"]) == ("done", 100)


# -- bad values --------------------------------------------------------------------------------------------------------

BAD = [
    (dict(total_steps=0), ValueError, "total_steps must be at least 2, got 0"),
    (dict(total_steps=100.0), TypeError, "total_steps must be an int, got 100.0"),
    (dict(total_steps=True), TypeError, "total_steps must be an int, got True"),
    (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    (dict(seed="x"), TypeError, "seed must be an int, got 'x'"),
    (dict(concurrency=0), ValueError, "concurrency must be at least 1, got 0"),
    (dict(lr_interval=0.1), TypeError, "lr_interval must be a pair .* got 0.1"),
    (dict(lr_interval=(0.1,)), TypeError, "lr_interval must be a pair"),
    (dict(lr_interval=(0.0, 0.1)), ValueError, "min_lr must be a finite number in .* got 0.0"),
    (dict(lr_interval=(0.1, math.inf)), ValueError, "max_lr must be a finite number in .* got inf"),
    (dict(lr_interval=(0.1, math.nan)), ValueError, "max_lr must be a finite number in .* got nan"),
    (dict(lr_interval=("a", "b")), TypeError, "min_lr must be a number, got 'a'"),
    (dict(lr_interval=(0.2, 0.1)), ValueError, "min_lr must be below max_lr, got low=0.2, high=0.1"),
    (dict(lr_interval=(0.1, 0.1)), ValueError, "min_lr must be below max_lr"),
    (dict(policy="pbt"), ValueError, "policy must be one of .* got 'pbt'"),
    (dict(colour="red"), TypeError, "has no option colour; it has"),
]
BAD_PAPER = [
    (dict(stage_steps=None), ValueError, "needs stage_steps"),
    (dict(stage_steps=0), ValueError, "stage_steps must be at least 1, got 0"),
    (dict(stage_steps=2.5), TypeError, "stage_steps must be an int, got 2.5"),
    (dict(max_stage_steps=10), ValueError, "max_stage_steps must be at least stage_steps.*10"),
    (dict(max_stage_steps=0), ValueError, "max_stage_steps must be at least 1, got 0"),
    (dict(probe_steps=0), ValueError, "probe_steps must be at least 1, got 0"),
    (dict(probe_steps=21), ValueError, "probe_steps must be at most stage_steps.*21"),
    (dict(warmup_steps=-1), ValueError, "warmup_steps must be at least 0, got -1"),
    (dict(warmup_steps=100, warmup_lr=0.1), ValueError, "warmup_steps must be below total_steps.*100"),
    (dict(warmup_steps=5), ValueError, "warmup_lr must be a finite number .* got 0.0"),
    (dict(warmup_steps=5, warmup_lr="x"), TypeError, "warmup_lr must be a number, got 'x'"),
    (dict(num_lrs=0), ValueError, "num_lrs must be at least 1, got 0"),
    (dict(kappa=-1.0), ValueError, "kappa must be a finite number .* got -1.0"),
    (dict(kappa=math.nan), ValueError, "kappa must be a finite number .* got nan"),
    (dict(kappa=True), TypeError, "kappa must be a number, got True"),
    (dict(initial="sobol"), ValueError, "initial must be one of .* got 'sobol'"),
    (dict(fit="adam"), ValueError, "fit must be one of .* got 'adam'"),
    (dict(series="test"), ValueError, "series must be .* got 'test'"),
    (dict(probe_reports=0), ValueError, "probe_reports must be at least 1, got 0"),
    (dict(main_reports=0), ValueError, "main_reports must be at least 1, got 0"),
    (dict(main_reports=1.5), TypeError, "main_reports must be an int, got 1.5"),
    (dict(promote="no"), TypeError, "promote must be True or False, got 'no'"),
    (dict(envelope="square"), ValueError, "unknown envelope 'square'"),
    (dict(envelope=["linear"]), ValueError, r"unknown envelope \['linear'\]"),
    (dict(envelope=lambda step: -1.0), ValueError, "envelope must be finite and >= 0 .* -1.0"),
    (dict(rungs=(0.5,)), TypeError, "has no option rungs"),
]
BAD_ANCHORED = [
    (dict(num_lrs=0), ValueError, "num_lrs must be at least 1, got 0"),
    (dict(num_lrs=3.0), TypeError, "num_lrs must be an int, got 3.0"),
    (dict(commits=0), ValueError, "commits must be at least 1, got 0"),
    (dict(envelope="square"), ValueError, "unknown envelope 'square'"),
    (dict(stage_steps=10), TypeError, "has no option stage_steps"),
]


@pytest.mark.parametrize(
    ("policy", "values", "error", "message"),
    [("paper", *case) for case in BAD + BAD_PAPER] + [("anchored", *case) for case in BAD + BAD_ANCHORED],
)
def test_a_bad_value_is_refused_by_name(policy, values, error, message):
    good = dict(policy=policy, total_steps=100, **(OPTIONS if policy == "paper" else {}))
    values = {**good, **values}
    with pytest.raises(error, match=message):
        make_policy(values.pop("policy"), values.pop("total_steps"), **values)


def test_divergence_of_high_learning_rates_leaves_a_run_that_ends():
    simulation = Simulation(paper(lr_interval=(1e-3, 100.0), num_lrs=6, initial="grid", kappa=2.0))
    simulation.change = diverging(above=1.0, after=2)(simulation)
    simulation.run()
    assert all(row["lr"] <= 1.0 for row in simulation.of("commit"))
    assert simulation.store[simulation.policy.checkpoint].loss < Toy().loss
