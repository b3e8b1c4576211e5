"""Who joins the race: branches from the leader's state, and LRs by the Gaussian process."""

from __future__ import annotations

import math

import pytest

from autolrs_ray.core.paper import surrogate
from autolrs_ray.core.policy import Point
from autolrs_ray.core.race.plan import RUNGS
from autolrs_ray.core.race.rule import Trunk, infill
from tests.races import anchored, drive
from tests.simulation import Simulation

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
    trunks = [Trunk(1.0, 0.125, scores={10: 1.02}), Trunk(2.0, 0.375, scores={10: 1.0})]
    trunks += [Trunk(3.0, 0.625, status="diverged"), Trunk(4.0, 0.875, status="diverged")]
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
