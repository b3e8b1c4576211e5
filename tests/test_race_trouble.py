"""The race survives trouble: divergence, failures, lost checkpoints, interruptions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from autolrs_ray.core.envelopes import envelope_factor
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from tests.races import anchored, drive
from tests.simulation import Simulation, diverging


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
