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
from tests.papers import decaying, finish_probe, paper
from tests.simulation import Simulation

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
