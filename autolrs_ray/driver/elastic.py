"""Elastic trials: they train with as many workers as have them all through soonest, and change their size where they rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray.core.events import Event
from autolrs_ray.core.segments import Segment
from autolrs_ray.core.workers import Pace, best_units
from autolrs_ray.driver.desk import Desk
from autolrs_ray.private import keep_actors_warm, starting_actor, unstage

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

PENDING_S, HELD_S = 30.0, 600.0
"""How long a grown trial waits for slots that the cluster has and others hold; and for how long then half as many will do."""


def grown(least: Any, units: int) -> Any:
    """The PlacementGroupFactory of a trial with `units` times the bundles of `least`."""
    if units == 1:
        return least
    return PlacementGroupFactory([{}, *(dict(bundle) for bundle in least.bundles * units)], strategy=least.strategy)


class Elastic:
    """Says how many units trials begin with, tells Tune, and keeps idle actors of the sizes that are in use.

    least: the PlacementGroupFactory of a trial with one unit. In a run whose trials do not grow, all have one.
    small: nothing is known yet of how many rows a batch has, and the first trial begins with one unit.
    """

    def __init__(
        self, desk: Desk, controller: TuneController, least: Any, live: Mapping[str, Trial], small: bool = False
    ) -> None:
        self._desk, self._controller, self._least, self._live = desk, controller, least, live
        self._small, self._pace = small, Pace()
        self._begun = False
        self._most: int | None = None  # units that others leave us, until then
        self._until = 0.0
        self._since: dict[str, float] = {}  # trial -> since when it waits for an actor
        self._starting: dict[str, float] = {}  # trial -> since when
        self._fresh: dict[str, bool] = {}  # trials whose actors have yet to report: whether they have been another size
        self._steps: dict[str, int] = {}  # at the last report
        self._warm: Counter[int] = Counter()  # units -> idle actors that Tune may keep
        desk.capacity.units = self._best(None)

    def resources(self, units: int) -> Any:
        return grown(self._least, units)

    def drop(self, trial_id: str) -> None:
        """The trial is gone, or starts anew."""
        for book in (self._steps, self._starting, self._since, self._fresh):
            book.pop(trial_id, None)  # type: ignore[attr-defined]

    def heard(self, trial_id: str, step: int, result: dict[str, Any]) -> None:
        """A trial has reported: how long a step takes, and how long it took to begin."""
        busy_s = float(result.get("time_this_iter_s") or 0.0)
        before = self._steps.get(trial_id, self._desk.segment(trial_id).start)
        self._pace.trained(self._desk.capacity.held(trial_id), step - before, busy_s, trial_id in self._fresh)
        self._steps[trial_id] = step
        self._small = False
        if rows := result.get("batch_size"):
            self._desk.settings.cap_units(int(rows) // self._desk.settings.least_workers)
        again = self._fresh.pop(trial_id, None)
        if (since := self._starting.pop(trial_id, None)) is not None:
            seconds = max(0.0, time.monotonic() - since - busy_s)
            if again is None:
                self._pace.switched(seconds)
            else:
                self._pace.started(seconds, again)

    def _best(self, now: int | None) -> int:
        settings, policy = self._desk.settings, self._desk.policy
        if not settings.elastic or self._small:
            return 1
        if time.monotonic() > self._until:
            self._most = None
        limits = [most for most in (settings.most_units, self._most) if most]
        in_play = [steps for steps in policy.demand().values() if steps > 0]
        return best_units(now, in_play, self._desk.capacity.slots, min(limits, default=None), self._pace)

    def rests(self, trial_id: str) -> bool:
        """Whether a trial that could train on is to be stopped here, so that it goes on with other units."""
        capacity = self._desk.capacity
        held = capacity.held(trial_id)
        return self._desk.settings.elastic and capacity.busy <= held and self._best(held) != held

    def choose(self) -> None:
        """Say with how many units trials begin next. While any trains it stays as it is."""
        if not self._desk.capacity.busy:
            self._desk.capacity.units = self._best(self._desk.capacity.units if self._begun else None)

    def begin(self, trial: Trial, segment: Segment) -> None:
        """Give `trial`, which is to start, its units."""
        desk, trial_id = self._desk, trial.trial_id
        before, units = desk.capacity.held(trial_id), desk.capacity.units
        desk.capacity.take(trial_id)
        desk.capacity.busy += units
        self._give(trial, segment.start, units != before, units != before)

    def add(self, trial: Trial, segment: Segment) -> None:
        """As `begin`, of a new trial, which has been counted as busy."""
        if not self._begun:  # the run's first, which was there before it was known how many fit
            self._desk.capacity.take(trial.trial_id)
            self._desk.capacity.busy = self._desk.capacity.units
        self._give(trial, segment.start, new=True, again=False)

    def _give(self, trial: Trial, step: int, new: bool, again: bool) -> None:
        desk, trial_id = self._desk, trial.trial_id
        self._begun = True
        self._steps.pop(trial_id, None)
        self._starting[trial_id] = time.monotonic()
        if not new:
            return
        if trial.placement_group_factory != self.resources(desk.capacity.held(trial_id)):
            trial.update_resources(self.resources(desk.capacity.held(trial_id)))
        self._fresh[trial_id] = again
        if desk.settings.elastic:
            workers, slots = desk.capacity.workers(trial_id), desk.capacity.slots * desk.capacity.least
            desk.note(Event.WORKERS, arm=desk.arm(trial_id), step=step, workers=workers, slots=slots)

    def settle(self) -> bool:
        """Let trials that wait for more than they get wait for less, and Tune keep as many idle actors of each size as may be
        needed. True if it is to keep fewer of some size."""
        self._give_up_what_is_not_there()
        capacity = self._desk.capacity
        active = [trial for trial in self._live.values() if trial.status in (Trial.RUNNING, Trial.PENDING)]
        warm = Counter(capacity.held(trial.trial_id) for trial in active)
        free = capacity.slots - sum(units * count for units, count in warm.items())
        warm[capacity.units] += max(0, free) // capacity.units
        changes = {units: warm[units] - self._warm[units] for units in {*warm, *self._warm}}
        self._warm = warm
        for units, more in changes.items():
            if more:
                keep_actors_warm(self._controller, self.resources(units), capacity.slots, more=more)
        return self._desk.settings.elastic and any(more < 0 for more in changes.values())

    def _give_up_what_is_not_there(self) -> None:
        """A trial that waits for more slots than there are, or for some that others hold, rests, and starts again with less."""
        desk, now = self._desk, time.monotonic()
        for trial_id, trial in self._live.items():
            units = desk.capacity.held(trial_id)
            if trial.status != Trial.PENDING or units == 1 or not desk.knows(trial_id):
                self._since.pop(trial_id, None)
                continue
            if starting_actor(self._controller, trial) is not None:
                self._since.pop(trial_id, None)
            waits = now - self._since.setdefault(trial_id, now) > PENDING_S
            if units <= desk.capacity.slots and not waits:
                continue
            if waits:
                self._most, self._until = units // 2, now + HELD_S
                desk.warn(
                    f"others hold slots of the cluster: on with {self._most * desk.settings.least_workers} workers"
                )
            self._since.pop(trial_id, None)
            unstage(self._controller, trial)
            desk.withdraw(trial_id)
