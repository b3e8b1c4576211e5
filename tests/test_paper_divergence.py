"""PaperPolicy: losses that explode, and what is forecast of them."""

from __future__ import annotations

import json
import math

import pytest

from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from tests.papers import decaying, finish_probe, into_the_second_stage, paper
from tests.simulation import Simulation, Toy, diverging

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


# -- bad values --------------------------------------------------------------------------------------------------------


def test_divergence_of_high_learning_rates_leaves_a_run_that_ends():
    simulation = Simulation(paper(lr_interval=(1e-3, 100.0), num_lrs=6, initial="grid", kappa=2.0))
    simulation.change = diverging(above=1.0, after=2)(simulation)
    simulation.run()
    assert all(row["lr"] <= 1.0 for row in simulation.of("commit"))
    assert simulation.store[simulation.policy.checkpoint].loss < Toy().loss
