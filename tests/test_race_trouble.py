"""The race survives trouble: divergence, failures, lost checkpoints, interruptions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from autolrs_ray.core.envelopes import lr_factor
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from autolrs_ray.core.race.plan import RacePlan
from tests.races import anchored, drive, start
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
    policy.report("t00", Point(4, 1.0))
    policy.saved("t00", 4, "here")
    policy.report("t01", Point(2, math.nan))
    with pytest.raises(AutoLRSError, match=r"failed for good \(killed\).*here \(step 4\).*resume"):
        policy.failed("t00", "killed")
    restored = anchored(100, num_lrs=2)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert [(segment.arm, segment.start) for segment in restored.wanted()] == [("t00", 4)]


def test_a_cause_that_fails_all_trunks_at_the_start_can_be_mended_and_the_whole_field_resumed():
    policy = anchored(100, num_lrs=3)
    policy.failed("t00", "no such data set")
    policy.failed("t01", "no such data set")
    with pytest.raises(AutoLRSError, match="no such data set"):
        policy.failed("t02", "no such data set")
    restored = anchored(100, num_lrs=3)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert [segment.arm for segment in restored.wanted()] == ["t00", "t02"]
    assert all(trunk.active for trunk in restored.trunks)


def interrupted_with_its_best_failed(until):
    """A race whose best learning rate failed at its start, interrupted at the rung `until`; and the arm of that one."""

    def race():
        return anchored(num_lrs=4, lr_interval=(0.01, 1.0))

    best = Simulation(race()).run().of("done")[0]["arm"]
    simulation = Simulation(race())
    trunk = simulation.policy.trunks[int(best[1:])]
    simulation.change = lambda arm, point: "fail" if arm == best and not trunk.readings else None
    while simulation.policy.plan.fractions[simulation.policy.race.decided] < until:
        simulation.act()
    assert simulation.policy.failures() == [trunk.lr]
    simulation.change = lambda arm, point: None
    simulation.interrupt(race())
    simulation.policy.try_again()
    return simulation, best


def test_what_failed_before_its_first_rung_is_tried_again_when_the_race_goes_on_and_may_win():
    for until in (0.04, 0.16):
        simulation, best = interrupted_with_its_best_failed(until)
        assert simulation.policy.failures() == []
        simulation.run()
        assert simulation.of("done")[0]["arm"] == best


def test_nothing_is_tried_again_once_the_race_has_settled():
    simulation, best = interrupted_with_its_best_failed(0.4)
    assert len(simulation.policy.failures()) == 1
    simulation.run()
    assert simulation.of("done")[0]["arm"] != best


def test_a_trunk_restarted_from_an_older_checkpoint_goes_over_its_rungs_again_harmlessly():
    policy = anchored(1000, num_lrs=2, concurrency=2)
    for step in (20, 30):
        for i in range(2):
            policy.report(f"t{i:02d}", Point(step, 1.0 - 1e-3 * i * step))
            policy.saved(f"t{i:02d}", step, f"t{i:02d}@{step}")
    before, decided = dict(policy.trunks[1].readings), policy.race.decided
    policy.drain_events()
    for step in (10, 20, 25):
        assert policy.report("t01", Point(step, 50.0)) in (Verdict.CONTINUE, Verdict.SAVE)
        policy.saved("t01", step, "again")
    assert (policy.trunks[1].readings, policy.race.decided, policy.trunks[1].step) == (before, decided, 30)
    assert policy.trunks[1].checkpoint == "t01@30"
    assert [event for event in policy.drain_events() if event["event"] in ("rung", "decision", "commit")] == []


def test_a_rung_passed_again_after_a_lost_checkpoint_is_not_scored_twice():
    whole = Simulation(anchored()).run()
    simulation = Simulation(anchored())
    while simulation.policy.race.decided < 3:
        simulation.act()
    trunk = next(trunk for trunk in simulation.policy.trunks if trunk.status == "open" and trunk.previous)
    index = simulation.policy.trunks.index(trunk)
    readings = dict(trunk.readings)
    simulation.interrupt(anchored())
    simulation.policy.lost(trunk.checkpoint)
    simulation.run()
    again = simulation.policy.trunks[index].readings
    assert {rung: again[rung] for rung in readings} == readings
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


@pytest.mark.parametrize(("slots", "options"), [(1, {}), (3, {}), (8, {"warmup": 0.2}), (2, {"run_ahead": False})])
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


def test_the_checkpoints_kept_are_two_of_a_trunk_in_play_one_of_one_that_waits_and_the_winners_at_the_end():
    simulation = Simulation(anchored())  # which fails where one is missing
    while not simulation.policy.done:
        simulation.act()
        statuses = [trunk.status for trunk in simulation.policy.trunks]
        kept = 2 * (statuses.count("open") + statuses.count("won")) + statuses.count("waiting")
        assert len(simulation.store) <= kept
    assert len(simulation.store) <= 2
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


@pytest.mark.parametrize("every", [10, 30, 60])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("slots", [1, 3, 12])
def test_it_is_found_out_where_reports_pass_several_rungs(every, warmup, slots):
    simulation = Simulation(anchored(concurrency=slots, warmup=warmup), slots, every)
    simulation.change = lambda arm, point: Point(point.step, 1.0 / point.step, 2.0 / point.step)
    with pytest.raises(AutoLRSError, match=r"does not use config\[\"lr\"\]"):
        simulation.run()


def test_equal_scores_alone_do_not_accuse_a_trainable_whose_training_losses_differ():
    simulation = Simulation(anchored(), change=lambda arm, point: replace(point, loss=-1.0, averaged_loss=-1.0))
    assert simulation.run().policy.done


def test_the_race_finds_a_good_learning_rate_and_trains_it_once():
    simulation = Simulation(anchored(400, num_lrs=12)).run()
    done = simulation.of("done")[0]
    full = {}
    for trunk in simulation.policy.trunks:
        alone = simulation.toy.train(400, lambda t, lr=trunk.lr: lr * lr_factor("quadratic", t, 400, 80))
        full[trunk.lr] = alone.loss
    assert done["loss"] == full[done["lr"]]  # the winning trunk is the run: no step of it was trained otherwise
    assert done["loss"] <= 1.3 * min(full.values())
    assert simulation.trained < 3.3 * 400


def test_progress_says_where_the_run_stands():
    policy = anchored()
    assert policy.trials_needed == 8
    assert policy.breadth == 3
    simulation = Simulation(policy).run()
    progress = simulation.policy.progress()
    assert (progress["phase"], progress["step"]) == ("done", 200)
    assert progress["lr"] == simulation.of("done")[0]["lr"]


# -- what is said plainly ----------------------------------------------------------------------------------------------


def told(policy):
    return [event["message"] for event in policy.drain_events() if event["event"] == "warning"]


def test_a_winner_at_an_end_of_the_interval_is_pointed_out():
    for sign, word in ((1, "largest"), (-1, "smallest")):
        policy = anchored(1000)
        drive(policy, lambda lr, step, sign=sign: 3.0 - (2.0 + 0.1 * sign * math.log(lr)) * step / 1000)
        (message,) = told(policy)
        assert f"is the {word} of the interval" in message
        assert "widen lr_interval=(0.001, 10.0)" in message
    policy = anchored(1000)
    drive(policy, lambda lr, step: 3.0 - (2.0 - 0.2 * abs(math.log(lr))) * step / 1000)
    assert told(policy) == []


def test_a_race_in_which_nothing_was_learned_says_so():
    policy = anchored(1000)
    drive(policy, lambda lr, step: 2.3 + 0.01 * math.sin(step + lr))
    (message,) = told(policy)
    assert "no learning rate has learned anything" in message


def test_an_lr_that_raises_has_diverged_there_if_others_go_on():
    policy = anchored(1000, num_lrs=8)

    def losses(lr, step):
        return 3.0 - (2.0 + 0.1 * math.log(lr)) * step / 1000

    failing = {"t07", "t06", "t05", "t04"}  # they raise at once
    while not policy.done and (wanted := policy.wanted()):
        segment = wanted[0]
        policy.issue(segment.arm)
        if segment.arm in failing and segment.start == 0:
            policy.withdraw(segment.arm)
            policy.failed(segment.arm, "overflow")
            continue
        for step in segment.boundaries:
            verdict = policy.report(segment.arm, Point(step, losses(segment.lr, step)))
            if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
                policy.saved(segment.arm, step, f"{segment.arm}@{step}")
            if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
                break
        policy.withdraw(segment.arm)
    assert {trunk.status for trunk in policy.trunks[4:]} == {"failed"}
    assert policy.trunks[3].status == "won"


def test_where_three_fail_at_one_place_it_is_not_the_learning_rate_and_they_come_back_once_it_is_mended():
    policy = anchored(1000, num_lrs=8, concurrency=3)
    for arm in ("t00", "t07"):
        policy.failed(arm, "no such file")
    with pytest.raises(AutoLRSError, match=r"the third trunk that failed, and none has come further.*no such file"):
        policy.failed("t06", "no such file")
    restored = anchored(1000, num_lrs=8)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert {trunk.status for trunk in restored.trunks} <= {"untried", "open"}
    assert [segment.arm for segment in restored.wanted()] == ["t00", "t07"]


def test_a_run_goes_on_under_the_rule_that_it_began_by_whatever_the_defaults_are_now():
    policy = anchored(1000)
    policy.follow(RacePlan.of(1000, (0.1, 0.3, 1.0), settled=0.5))
    restored = anchored(1000, commits=3)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert restored.plan == policy.plan
    assert restored.commits == policy.commits
    assert [segment.boundaries for segment in restored.wanted()] == [segment.boundaries for segment in policy.wanted()]
    state = {key: value for key, value in policy.state_dict().items() if key != "plan"}
    with pytest.raises(ValueError, match=r"a race by an earlier rule .*no plan.*version that began it"):
        anchored(1000).load_state_dict(state)
    with pytest.raises(ValueError, match="began with the envelope 'quadratic'"):
        anchored(1000, envelope=lambda step: 1.0).load_state_dict(policy.state_dict())


def test_a_race_for_the_highest_metric_is_led_by_the_loss_and_decided_by_the_metric():
    policy = anchored(1000, num_lrs=2)
    start(policy)
    for i, (guide, accuracy) in enumerate(((1.001, -0.9), (1.0, -0.8))):
        for step in policy._boundaries:
            policy.report(f"t{i:02d}", Point(step, accuracy, guide=3.0 - 2.0 * step / 1000 * guide))
            policy.saved(f"t{i:02d}", step, f"t{i:02d}@{step}")
    assert policy.trunks[0].status == "won"
    assert policy.trunks[0].saved_loss == -0.9
