"""How many workers a trial gets: the rule, and what the driver makes of it. No Ray runs here."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray import AutoLRSSearch
from autolrs_ray.core.policy import Point
from autolrs_ray.core.workers import Pace, fair_units, parse_workers, units_for
from autolrs_ray.driver.elastic import Elastic, grown


@pytest.mark.parametrize(
    ("workers", "expected"),
    [(1, (1, 1)), (4, (4, 4)), ("elastic", (1, None)), ((1, 8), (1, 8)), ((2, 6), (2, 6)), ([2, 2], (2, 2))],
)
def test_workers_are_a_number_or_a_range(workers: Any, expected: tuple[int, int | None]) -> None:
    assert parse_workers(workers) == expected


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "many", (1, 2, 3), (4, 2), (2, 5), (0, 4), (1, "all"), None])
def test_anything_else_is_refused_by_name(workers: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"least|most|workers"):
        parse_workers(workers)


@pytest.mark.parametrize(
    ("demand", "slots", "most", "expected"),
    [
        ({"a": 9}, 12, None, {"a": 12}),
        ({"a": 9}, 12, 4, {"a": 4}),
        ({"a": 9, "b": 9}, 8, None, {"a": 4, "b": 4}),
        ({"a": 9, "b": 9, "c": 9}, 8, None, {"a": 2, "b": 2, "c": 2}),  # they wait for each other
        ({"a": 9, "b": 9, "ahead": 0}, 9, None, {"a": 4, "b": 4, "ahead": 1}),
        ({"p": 0, "q": 0}, 8, None, {"p": 1, "q": 1}),  # one worker per probe
        ({"a": 9, "b": 9, "c": 9}, 2, None, {"a": 1, "b": 1, "c": 1}),  # they take turns
        ({"a": 9, "p": 0, "q": 0}, 2, None, {"a": 1, "p": 1, "q": 1}),
        ({}, 4, None, {}),
    ],
)  # fmt: skip
def test_slots_are_shared_evenly(
    demand: dict[str, int], slots: int, most: int | None, expected: dict[str, int]
) -> None:
    assert fair_units(demand, slots, most) == expected


def paced(restart_s: float, **step_s: float) -> Pace:
    pace = Pace()
    for units, seconds in step_s.items():
        pace.trained(int(units[1:]), 10, 10 * seconds)
    pace.started(restart_s, again=True)
    return pace


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, 4), (9, 4), (8, 1), (1, 1), (0, 1)],  # 4 workers save .75 s a step, two restarts take 6 s
)
def test_a_trial_grows_where_the_steps_ahead_save_more_than_two_restarts(steps: int, expected: int) -> None:
    assert units_for(1, 4, steps, paced(3.0, u1=1.0)) == expected


def test_what_was_measured_counts_more_than_what_was_hoped_for() -> None:
    slow = paced(3.0, u1=1.0, u4=1.1)  # as where four workers share one core
    assert units_for(1, 4, 10_000, slow) == 1
    assert units_for(4, 4, 10_000, slow) == 1
    assert units_for(4, 4, 10, slow) == 4  # not worth it any more
    assert units_for(1, 8, 10_000, paced(3.0, u1=1.0, u4=0.3)) == 8
    assert units_for(2, 8, 10_000, paced(3.0, u2=0.5, u4=0.3, u8=0.4)) == 4


def test_nothing_changes_before_anything_is_known_but_what_is_too_much_is_given_back() -> None:
    unknown = Pace()
    assert units_for(1, 4, 10_000, unknown) == 1
    assert units_for(4, 2, 10_000, unknown) == 2
    assert units_for(4, 2, 0, paced(1e9, u1=1.0)) == 2


def test_pace_forgets_and_restarts_are_averaged() -> None:
    pace = Pace()
    pace.trained(1, 10, 40.0)
    pace.trained(1, 10, 10.0)
    pace.trained(1, 10, 10.0)
    pace.trained(1, 0, 99.0)
    assert pace.predicted_s(1) == pytest.approx(1.75)
    assert pace.restart_s is None
    pace.started(8.0, again=False)
    pace.started(1.0, again=False)  # in an actor that was warm
    assert pace.restart_s == 8.0
    pace.started(2.0, again=True)
    pace.started(4.0, again=True)
    assert pace.restart_s == 3.0


class FakeTrial:
    def __init__(self, trial_id: str, resources: Any) -> None:
        self.trial_id, self.status, self.placement_group_factory = trial_id, Trial.PENDING, resources

    def update_resources(self, resources: Any) -> None:
        assert self.status != Trial.RUNNING
        self.placement_group_factory = resources


class FakeCache:
    """Of idle actors, by what these hold."""

    def __init__(self) -> None:
        self.most: dict[int, int] = {}

    def increase_max(self, resources: Any, by: int) -> None:
        units = len(resources.bundles)
        self.most[units] = self.most.get(units, 0) + by
        assert self.most[units] >= 0

    def decrease_max(self, resources: Any) -> None:
        self.increase_max(resources, -1)


class FakeController:
    """What the driver uses of Tune's."""

    def __init__(self) -> None:
        self._reuse_actors, self._max_pending_trials, self._actor_cache = True, 1, FakeCache()
        self._trial_to_actor: dict[Any, Any] = {}
        self._staged_trials: set[Any] = set()

    def _set_trial_status(self, trial: FakeTrial, status: str) -> None:
        trial.status = status


ONE = PlacementGroupFactory([{"CPU": 1}])


class Run:
    """A race of three on `slots` slots, up to where the coordinator would call Tune."""

    def __init__(self, slots: int, **options: Any) -> None:
        self.desk = AutoLRSSearch(1000, **{"num_lrs": 3, "workers": "elastic", **options}).desk
        self.desk.plan_for(slots)
        self.live: dict[str, FakeTrial] = {}
        self.controller: Any = FakeController()
        self.elastic = Elastic(self.desk, self.controller, ONE, self.live)  # type: ignore[arg-type]
        self.elastic.settle()

    def count(self) -> None:
        busy = [t for t in self.live.values() if t.status in (Trial.RUNNING, Trial.PENDING)]
        self.desk.count_busy(sum(self.desk.units(trial.trial_id) for trial in busy))

    def start(self, trial_id: str) -> int:
        """A new trial's units."""
        segment = self.desk.assign(trial_id)
        assert segment is not None
        self.live[trial_id] = trial = FakeTrial(trial_id, ONE)
        self.elastic.add(trial, segment)
        trial.status = Trial.RUNNING
        self.count()
        return self.desk.units(trial_id)

    def report(self, trial_id: str, step: int, seconds: float, loss: float = 1.0) -> None:
        self.elastic.heard(trial_id, step, {"time_this_iter_s": seconds})
        self.desk.report(trial_id, Point(step, loss, loss), can_save=True)
        self.desk.policy.saved(self.desk.arm(trial_id), step, f"{trial_id}@{step}")

    def pause(self, trial_id: str) -> None:
        self.live[trial_id].status = Trial.PAUSED
        self.desk.withdraw(trial_id)
        self.count()

    def resume(self, trial_id: str) -> bool:
        segment = next(s for s in self.desk.policy.wanted() if s.arm == self.desk.arm(trial_id))
        if not self.elastic.begin(self.live[trial_id], segment):  # type: ignore[arg-type]
            return False
        self.desk.hand_over(trial_id, segment)
        self.live[trial_id].status = Trial.RUNNING
        self.count()
        return True


def lone(slots: int, **options: Any) -> Run:
    """A race that is over but for the training: one trial, which has reported once, a second a step."""
    run = Run(slots, num_lrs=1, **options)
    assert run.start("a") == 1
    run.report("a", 20, seconds=20.0)
    run.elastic._pace.started(3.0, again=True)
    return run


def test_a_grown_trial_has_the_bundles_of_so_many() -> None:
    assert grown(ONE, 1) is ONE
    assert grown(ONE, 3) == PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}, {"CPU": 1}])
    pair = PlacementGroupFactory([{}, {"GPU": 1}, {"GPU": 1}], strategy="SPREAD")
    assert grown(pair, 2) == PlacementGroupFactory([{}, *[{"GPU": 1}] * 4], strategy="SPREAD")


def test_the_last_one_grows_into_all_slots_when_it_rests_and_idle_actors_make_room() -> None:
    run = lone(4)
    assert run.controller._actor_cache.most == {1: 4}
    assert run.elastic.rests("a")
    run.pause("a")
    assert run.resume("a")
    assert run.desk.units("a") == 4
    assert run.live["a"].placement_group_factory == grown(ONE, 4)
    assert run.desk.busy == 4
    assert not run.elastic.rests("a")
    assert run.elastic.settle()
    assert run.controller._actor_cache.most == {1: 0, 4: 1}
    events = [event for event in run.desk.policy.drain_events() if event["event"] == "workers"]
    assert [(e["arm"], e["step"], e["workers"], e["slots"]) for e in events] == [("t00", 0, 1, 4), ("t00", 20, 4, 4)]
    run.pause("a")
    assert run.resume("a")  # in the actor that it has left
    assert not [event for event in run.desk.policy.drain_events() if event["event"] == "workers"]


def test_workers_of_a_range_stay_in_it_and_one_worker_never_grows() -> None:
    run = lone(8, workers=(2, 4))
    assert run.elastic.rests("a")
    run.pause("a")
    assert run.resume("a")
    assert (run.desk.units("a"), run.desk.workers("a")) == (2, 4)
    fixed = lone(8, workers=2)
    assert not fixed.elastic.rests("a")
    assert fixed.desk.workers("a") == 2


def test_there_are_no_more_workers_than_rows_in_a_batch() -> None:
    run = lone(8)
    run.elastic.heard("a", 21, {"time_this_iter_s": 1.0, "batch_size": 3})
    run.pause("a")
    assert run.resume("a")
    assert run.desk.workers("a") == 3


def test_a_trial_that_is_too_large_rests_and_who_comes_meanwhile_waits_for_it() -> None:
    run = Run(5)
    assert [run.start("a"), run.start("b")] == [1, 1]
    run.desk.take_units("a", 5)  # as after it has trained alone
    run.live["a"].placement_group_factory = grown(ONE, 5)
    run.count()
    assert run.desk.assign("c") is None
    run.pause("b")
    assert not run.resume("b")
    assert run.elastic.rests("a")
    run.pause("a")
    assert run.resume("b")
    assert run.resume("a")
    assert run.desk.units("a") == 2  # one is left to the learning rate that runs ahead
    assert run.desk.busy == 3


def test_on_a_cluster_that_has_shrunk_a_trial_waits_for_what_there_is() -> None:
    run = lone(4)
    run.pause("a")
    assert run.resume("a")
    trial = run.live["a"]
    trial.status = Trial.PENDING  # its worker was lost with a node, and Tune means to start it again
    run.controller._staged_trials.add(trial)
    run.controller._actor_cache.increase_max(trial.placement_group_factory, 1)
    run.desk.resize(3)
    run.elastic.settle()
    assert trial.status == Trial.PAUSED
    assert trial not in run.controller._staged_trials
    run.count()
    assert run.resume("a")
    assert run.desk.units("a") == 3
    run.elastic.settle()
    assert run.controller._actor_cache.most == {1: 0, 3: 1, 4: 0}


def test_the_papers_probes_have_a_worker_each_and_its_main_trial_all() -> None:
    run = Run(3, policy="paper", stage_steps=500, probe_steps=10, num_lrs=2, lr_interval=(0.1, 1.0))
    assert [run.start("a"), run.start("b")] == [1, 1]
    for trial_id, loss in (("a", 1.0), ("b", 2.0)):
        run.report(trial_id, 10, 10.0, loss)
        run.desk.forget(trial_id)
        del run.live[trial_id]
    run.count()
    run.elastic._pace.started(3.0, again=True)
    assert run.start("main") == 3
