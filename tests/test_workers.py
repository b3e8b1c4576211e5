"""How many workers a trial gets: the rule, and what the driver makes of it. No Ray runs here."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray import AutoLRSSearch
from autolrs_ray.core.policy import Point
from autolrs_ray.core.workers import Pace, best_units, parse_workers
from autolrs_ray.driver import elastic
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
    ("steps", "slots", "most", "expected"),
    [
        ([9], 12, None, 12),
        ([9], 12, 4, 4),
        ([9, 9], 8, None, 4),  # side by side
        ([9, 9, 9], 8, None, 8),  # in turns: no slot idles
        ([9, 9, 9], 9, None, 3),
        ([9, 9, 9], 64, None, 64),
        ([9, 1], 8, None, 8),  # the other one would soon be through
        ([9, 9, 9], 2, None, 2),
        ([9, 9], 2, None, 1),
        ([9, 9], 1, None, 1),
        ([9, 9], 3, 2, 1),
        ([], 4, None, 1),
    ],
)  # fmt: skip
def test_at_first_what_leaves_no_slot_idle_is_taken(
    steps: list[int], slots: int, most: int | None, expected: int
) -> None:
    assert best_units(None, steps, slots, most, Pace()) == expected


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
    assert best_units(1, [steps] if steps else [], 4, None, paced(3.0, u1=1.0)) == expected


def test_what_was_measured_counts_more_than_what_was_hoped_for() -> None:
    slow = paced(3.0, u1=1.0, u4=1.1)  # as where four workers share one core
    assert best_units(1, [10_000], 4, None, slow) == 1
    assert best_units(4, [10_000], 4, None, slow) == 1
    assert best_units(4, [10], 4, None, slow) == 4  # not worth it any more
    assert best_units(1, [10_000], 8, None, paced(3.0, u1=1.0, u4=0.3)) == 8
    assert best_units(2, [10_000], 8, None, paced(3.0, u2=0.5, u4=0.3, u8=0.4)) == 4


def test_two_that_hold_each_other_up_train_side_by_side_and_others_in_turns() -> None:
    assert best_units(8, [900, 900], 8, None, paced(3.0, u4=0.2, u8=0.1)) == 8  # no sooner by halves
    assert best_units(8, [900, 900], 8, None, paced(3.0, u4=0.2, u8=0.15)) == 4
    assert best_units(8, [50, 50], 8, None, paced(3.0, u4=0.2, u8=0.15)) == 8  # two restarts take 6 s
    assert best_units(4, [900], 8, None, paced(3.0, u4=0.2)) == 8


def test_short_turns_are_not_worth_the_switches() -> None:
    pace = paced(0.1, u4=0.2, u8=0.1)
    pace.switched(3.0)
    assert best_units(8, [900, 900], 8, None, pace) == 4  # a turn fewer, for a restart of .1 s
    assert best_units(None, [9, 9, 9], 8, None, Pace(switch_s=9.0)) == 2


def test_nothing_changes_before_anything_is_known_but_what_is_not_there_is_given_up() -> None:
    unknown = Pace()
    assert best_units(1, [10_000], 4, None, unknown) == 1
    assert best_units(4, [10_000], 2, None, unknown) == 2
    assert best_units(4, [10], 2, None, paced(1e9, u1=1.0)) == 2
    rough = Pace()
    rough.trained(1, 10, 90.0, first=True)
    rough.started(1.0, again=False)
    assert best_units(1, [10_000], 4, None, rough) == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(20))
def test_the_choice_fits_the_slots_and_does_not_depend_on_the_unit_of_time(seed: int, scale: float) -> None:
    generator = random.Random(seed)
    slots, count = generator.randint(1, 64), generator.randint(0, 12)
    steps = [generator.randint(1, 5000) for _ in range(count)]
    now, most = generator.choice([None, 1, slots]), generator.choice([None, 1, 7])
    pace = Pace()
    for units in {1, slots, generator.randint(1, slots)}:
        pace.trained(units, 10, scale * generator.uniform(0.5, 1.5) * 10 / units)
    pace.started(scale * generator.uniform(0.0, 20.0), again=True)
    found = best_units(now, steps, slots, most, pace)
    assert 1 <= found <= min(slots, most or slots)
    plain = Pace({units: seconds / scale for units, seconds in pace.step_s.items()})
    plain.started((pace.restart_s or 0.0) / scale, again=True)
    assert best_units(now, steps, slots, most, plain) == found


def test_pace_forgets_and_restarts_are_averaged() -> None:
    pace = Pace()
    pace.trained(1, 10, 90.0, first=True)  # with what is done once
    assert not pace.knows(1)
    pace.trained(1, 10, 40.0)
    pace.trained(1, 10, 10.0)
    pace.trained(1, 10, 10.0)
    pace.trained(1, 0, 99.0)
    pace.trained(1, 10, 99.0, first=True)  # in another actor
    assert pace.knows(1)
    assert pace.predicted_s(1) == pytest.approx(1.75)
    assert pace.predicted_s(7) == pytest.approx(0.25)
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

    def __init__(self, slots: int, small: bool = False, **options: Any) -> None:
        self.desk = AutoLRSSearch(1000, **{"num_lrs": 3, "workers": "elastic", **options}).desk
        self.desk.plan_for(slots)
        self.live: dict[str, FakeTrial] = {}
        self.controller: Any = FakeController()
        self.elastic = Elastic(self.desk, self.controller, ONE, self.live, small)  # type: ignore[arg-type]
        self.elastic.settle()

    def count(self) -> None:
        active = [t for t, trial in self.live.items() if trial.status in (Trial.RUNNING, Trial.PENDING)]
        self.desk.capacity.count(dict.fromkeys(active, True))
        self.elastic.choose()

    def start(self, trial_id: str) -> int:
        """A new trial's units."""
        segment = self.desk.assign(trial_id)
        assert segment is not None
        self.live[trial_id] = trial = FakeTrial(trial_id, ONE)
        self.elastic.add(trial, segment)  # type: ignore[arg-type]
        trial.status = Trial.RUNNING
        self.count()
        return self.desk.capacity.held(trial_id)

    def report(self, trial_id: str, step: int, seconds: float, loss: float = 1.0) -> None:
        self.elastic.heard(trial_id, step, {"time_this_iter_s": seconds})
        self.desk.report(trial_id, Point(step, loss, loss), can_save=True)
        self.desk.policy.saved(self.desk.arm(trial_id), step, f"{trial_id}@{step}")

    def pause(self, trial_id: str) -> None:
        self.live[trial_id].status = Trial.PAUSED
        self.desk.withdraw(trial_id)
        self.count()

    def resume(self, trial_id: str) -> bool:
        if not self.desk.capacity.room:
            return False
        segment = next(s for s in self.desk.policy.wanted() if s.arm == self.desk.arm(trial_id))
        self.elastic.begin(self.live[trial_id], segment)  # type: ignore[arg-type]
        self.desk.hand_over(trial_id, segment)
        self.live[trial_id].status = Trial.RUNNING
        self.count()
        return True

    def sizes(self) -> list[tuple[str, int, int, int]]:
        """(arm, step, workers, slots) of the journal's lines since the last time."""
        events = [event for event in self.desk.policy.drain_events() if event["event"] == "workers"]
        return [(e["arm"], e["step"], e["workers"], e["slots"]) for e in events]


def lone(slots: int, **options: Any) -> Run:
    """A race of one, whose trial has reported twice from its first actor, a second a step, and begun again in 3 s."""
    run = Run(slots, num_lrs=1, **options)
    run.desk.capacity.units = 1  # as if others had held the slots
    run.start("a")
    run.report("a", 20, seconds=20.0)
    run.report("a", 30, seconds=10.0)
    run.elastic._pace.started(3.0, again=True)
    return run


def test_a_grown_trial_has_the_bundles_of_so_many() -> None:
    assert grown(ONE, 1) is ONE
    assert grown(ONE, 3) == PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}, {"CPU": 1}])
    pair = PlacementGroupFactory([{}, {"GPU": 1}, {"GPU": 1}], strategy="SPREAD")
    assert grown(pair, 2) == PlacementGroupFactory([{}, *[{"GPU": 1}] * 4], strategy="SPREAD")


def test_new_trials_have_their_size_from_the_start() -> None:
    run = Run(8)
    assert [run.start("a"), run.start("b")] == [4, 4]  # the largest LR, and the smallest to the first rung
    assert run.live["a"].placement_group_factory == grown(ONE, 4)
    assert run.desk.capacity.busy == 8
    assert run.desk.assign("c") is None
    assert run.sizes() == [("t00", 0, 4, 8), ("t02", 0, 4, 8)]
    run.elastic.settle()
    assert run.controller._actor_cache.most == {4: 2}
    small = Run(8, small=True)  # nobody knows how many rows a batch has
    assert small.start("a") == 1


def test_one_alone_grows_into_all_slots_when_it_rests_and_idle_actors_make_room() -> None:
    run = lone(4)
    run.elastic.settle()
    assert run.controller._actor_cache.most[1] == 4
    assert run.elastic.rests("a")
    run.pause("a")
    assert run.resume("a")
    assert run.desk.capacity.held("a") == 4
    assert run.live["a"].placement_group_factory == grown(ONE, 4)
    assert run.desk.capacity.busy == 4
    assert not run.elastic.rests("a")
    assert run.elastic.settle()
    assert run.controller._actor_cache.most == {1: 0, 4: 1}
    assert run.sizes() == [("t00", 0, 1, 4), ("t00", 30, 4, 4)]
    run.pause("a")
    assert run.resume("a")  # in the actor that it has left
    assert run.sizes() == []


def test_workers_of_a_range_stay_in_it_and_one_worker_never_grows() -> None:
    run = lone(8, workers=(2, 4))
    assert run.elastic.rests("a")
    run.pause("a")
    assert run.resume("a")
    assert (run.desk.capacity.held("a"), run.desk.capacity.workers("a")) == (2, 4)
    fixed = lone(8, workers=2)
    assert not fixed.elastic.rests("a")
    assert fixed.desk.capacity.workers("a") == 2


def test_there_are_no_more_workers_than_rows_in_a_batch() -> None:
    run = lone(8)
    run.elastic.heard("a", 31, {"time_this_iter_s": 1.0, "batch_size": 3})
    run.pause("a")
    assert run.resume("a")
    assert run.desk.capacity.workers("a") == 3


def test_an_autoscaler_is_asked_for_what_was_asked_for() -> None:
    settings = Run(8).desk.settings
    settings.cap_units(128)  # rows of a batch
    assert (settings.asked_units, settings.most_units) == (1, 128)
    assert Run(8, workers=(1, 4)).desk.settings.asked_units == 4


def test_others_run_ahead_only_on_slots_that_those_in_play_cannot_use() -> None:
    assert Run(64).desk.policy.concurrency == 2
    assert Run(64, workers=(1, 8)).desk.policy.concurrency == 3
    assert Run(12, workers=(1, 8)).desk.policy.concurrency == 2
    assert Run(2).desk.policy.concurrency == 2
    assert Run(64, workers=1).desk.policy.concurrency == 64


def test_on_a_cluster_that_has_shrunk_a_trial_waits_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    run = lone(4)
    run.pause("a")
    assert run.resume("a")
    trial = run.live["a"]

    def waits(size: int) -> None:  # its worker was lost, and Tune means to start it again
        trial.status = Trial.PENDING
        run.controller._staged_trials.add(trial)
        run.controller._actor_cache.increase_max(grown(ONE, size), 1)

    waits(4)
    run.desk.resize(3)
    run.elastic.settle()
    assert trial.status == Trial.PAUSED
    assert trial not in run.controller._staged_trials
    run.count()
    assert run.resume("a")
    assert run.desk.capacity.held("a") == 3
    run.elastic.settle()
    assert run.controller._actor_cache.most == {3: 1, 4: 0}
    waits(3)
    run.elastic.settle()
    assert trial.status == Trial.PENDING
    monkeypatch.setattr(elastic, "PENDING_S", 0.0)  # another job holds slots
    time.sleep(0.001)
    run.elastic.settle()
    assert trial.status == Trial.PAUSED
    run.count()
    assert run.resume("a")
    assert run.desk.capacity.held("a") == 1


def test_probes_of_the_paper_and_its_main_trial_use_all_slots() -> None:
    run = Run(4, policy="paper", stage_steps=500, probe_steps=10, num_lrs=2, lr_interval=(0.1, 1.0))
    assert [run.start("a"), run.start("b")] == [2, 2]
    for trial_id, loss in (("a", 1.0), ("b", 2.0)):
        run.report(trial_id, 5, 5.0, loss)
        run.report(trial_id, 10, 5.0, loss)
        run.desk.forget(trial_id)
        del run.live[trial_id]
    run.elastic._pace.started(3.0, again=True)
    run.count()
    assert run.start("main") == 4
