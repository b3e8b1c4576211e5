"""PaperPolicy: failed trials, a main trial that diverges, lost checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from tests.papers import decaying, finish_probe, into_the_second_stage, paper
from tests.simulation import Simulation

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
