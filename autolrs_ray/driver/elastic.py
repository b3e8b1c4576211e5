"""Elastic trials: they grow into free slots, and shrink where others need them, whenever they rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray.core.events import Event
from autolrs_ray.core.segments import Segment
from autolrs_ray.core.workers import Pace, fair_units, units_for
from autolrs_ray.driver.desk import Desk
from autolrs_ray.private import keep_actors_warm, unstage

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


def grown(least: Any, units: int) -> Any:
    """The PlacementGroupFactory of a trial with `units` times the bundles of `least`."""
    if units == 1:
        return least
    return PlacementGroupFactory([{}, *(dict(bundle) for bundle in least.bundles * units)], strategy=least.strategy)


class Elastic:
    """Says how many units each trial gets, tells Tune, and keeps idle actors of the sizes that are in use.

    least: the PlacementGroupFactory of a trial with one unit. In a run whose trials do not grow, all have one.
    """

    def __init__(self, desk: Desk, controller: TuneController, least: Any, live: Mapping[str, Trial]) -> None:
        self._desk, self._controller, self._least, self._live = desk, controller, least, live
        self._pace = Pace()
        self._starting: dict[str, tuple[float, bool]] = {}  # trial -> since when, and whether it has been another size
        self._steps: dict[str, int] = {}  # at the last report
        self._rows = 0  # of a batch, if the trials tell
        self._warm: Counter[int] = Counter()  # units -> idle actors that Tune may keep

    def resources(self, units: int) -> Any:
        return grown(self._least, units)

    def drop(self, trial_id: str) -> None:
        """The trial is gone, or starts anew."""
        self._steps.pop(trial_id, None)
        self._starting.pop(trial_id, None)

    def heard(self, trial_id: str, step: int, result: dict[str, Any]) -> None:
        """A trial has reported: how long a step takes, and how long it took to begin."""
        busy_s = float(result.get("time_this_iter_s") or 0.0)
        before = self._steps.get(trial_id, self._desk.segment(trial_id).start)
        self._pace.trained(self._desk.units(trial_id), step - before, busy_s)
        self._steps[trial_id] = step
        self._rows = int(result.get("batch_size") or self._rows)
        if trial_id in self._starting:
            since, again = self._starting.pop(trial_id)
            self._pace.started(max(0.0, time.monotonic() - since - busy_s), again)

    def _fair(self) -> dict[str, int]:
        settings = self._desk.settings
        most = [
            most for most in (settings.most_units, self._rows and max(1, self._rows // settings.least_workers)) if most
        ]
        return fair_units(self._desk.policy.demand(), self._desk.slots, min(most, default=None))

    def _chosen(self, trial_id: str, arm: str) -> int:
        if not self._desk.settings.elastic:
            return 1
        fair = self._fair().get(arm, 1)
        return units_for(self._desk.units(trial_id), fair, self._desk.policy.demand().get(arm, 0), self._pace)

    def rests(self, trial_id: str) -> bool:
        """Whether a trial that could train on is to be stopped here, so that it goes on with other units."""
        return self._chosen(trial_id, self._desk.arm(trial_id)) != self._desk.units(trial_id)

    def begin(self, trial: Trial, segment: Segment) -> bool:
        """Give `trial`, which is to start, its units. False if it has to wait for one that holds more than its share."""
        desk, trial_id = self._desk, trial.trial_id
        units, free = self._chosen(trial_id, segment.arm), desk.slots - desk.busy
        if units > free:
            if free < 1 or self._some_hold_too_much():
                return False
            units = free
        self._give(trial, units, segment.start)
        return True

    def add(self, trial: Trial, segment: Segment) -> None:
        """As `begin`, of a new trial, which has been counted as busy with one unit and does not wait."""
        free = self._desk.slots - self._desk.busy + 1
        self._give(trial, max(1, min(self._chosen(trial.trial_id, segment.arm), free)), segment.start)

    def _some_hold_too_much(self) -> bool:
        fair, desk = self._fair(), self._desk
        running = [trial_id for trial_id, trial in self._live.items() if trial.status == Trial.RUNNING]
        return any(desk.units(t) > fair.get(desk.arm(t), 1) for t in running if desk.knows(t))

    def _give(self, trial: Trial, units: int, step: int) -> None:
        desk, trial_id = self._desk, trial.trial_id
        before = desk.take_units(trial_id, units)
        self._steps.pop(trial_id, None)
        if before != units:
            if trial.placement_group_factory != self.resources(units):
                trial.update_resources(self.resources(units))
            self._starting[trial_id] = time.monotonic(), before is not None
            if desk.settings.elastic:
                desk.note(
                    Event.WORKERS, arm=desk.arm(trial_id), step=step, workers=desk.workers(trial_id), slots=desk.slots
                )
        desk.count_busy(desk.busy + units - (before is None))

    def settle(self) -> bool:
        """Let trials that wait for more than there is wait for less, and Tune keep as many idle actors of each size as may be
        needed. True if it is to keep fewer of some size."""
        self._give_up_what_is_gone()
        warm, free = Counter[int](), self._desk.slots
        active = (Trial.RUNNING, Trial.PENDING)
        for trial in sorted(self._live.values(), key=lambda trial: trial.status not in active):
            units = self._desk.units(trial.trial_id)
            if units <= free:
                warm[units] += 1
                free -= units
        warm[1] += free
        changes = {units: warm[units] - self._warm[units] for units in {*warm, *self._warm}}
        self._warm = warm
        for units, more in changes.items():
            if more:
                keep_actors_warm(self._controller, self.resources(units), self._desk.slots, more=more)
        return self._desk.settings.elastic and any(more < 0 for more in changes.values())

    def _give_up_what_is_gone(self) -> None:
        """The cluster has shrunk: a trial that waits for more than its slots rests, and starts again with what there is."""
        for trial_id, trial in self._live.items():
            if trial.status == Trial.PENDING and self._desk.units(trial_id) > self._desk.slots:
                unstage(self._controller, trial)
                self._desk.withdraw(trial_id)
