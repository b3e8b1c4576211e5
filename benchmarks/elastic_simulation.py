"""A run on a cluster that is not here: the policy and the rule for workers are the real ones, the clock is virtual."""

from __future__ import annotations

import copy
import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.segments import Segment, next_report
from autolrs_ray.core.workers import Pace, best_units


@dataclass
class Simulated:
    """steps: trained in all trials together. seconds: of wall-clock. trained_s: slot-seconds in which a worker trained, those
    that are lost to imperfect scaling among them. restarts: actors that were started, whose slots idle meanwhile."""

    steps: int = 0
    seconds: float = 0.0
    trained_s: float = 0.0
    restarts: int = 0


def speed(units: int, efficiency: float) -> float:
    """Steps of `units` workers in the time of one of a single worker's: each further worker adds `efficiency` of one."""
    return 1.0 + efficiency * (units - 1)


class Losses:
    """What a trainer reports, of real training that is done once: the same stretch from the same state has the same losses.

    States are numbers; None is the initial one.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._states, self._known = trainer, [], {}  # type: ignore[var-annotated]

    def train(self, state: int | None, segment: Segment, step: int, until: int) -> tuple[int, Point]:
        """Train from `state` at `step`; the state at `until`, and the report there."""
        key = (state, segment.lr, step, until)
        if key not in self._known:
            trainer = self._trainer
            if state is None:
                trainer.reset()
            else:
                trainer.load_state_dict(copy.deepcopy(self._states[state]))
            train_loss = trainer.train(until, segment.lr_at)
            averaged = trainer.evaluate(averaged=True)["loss"] if trainer.averaging else None
            point = Point(until, trainer.evaluate()["loss"], train_loss, averaged)
            self._states.append(copy.deepcopy(trainer.state_dict()))
            self._known[key] = len(self._states) - 1, point
        found: tuple[int, Point] = self._known[key]
        return found


@dataclass
class _Trial:
    segment: Segment
    state: int | None
    step: int
    units: int
    fresh: bool


@dataclass
class Cluster:
    """`slots` slots; a step of one worker takes `step_s`, an actor `restart_s` to start, a trial in another's actor `switch_s`.

    most: units of a trial at most, None: as many as there are slots; 1: trials do not grow.
    """

    policy: Policy
    losses: Losses
    slots: int
    step_s: float
    restart_s: float = 3.0
    switch_s: float = 0.3
    efficiency: float = 1.0
    most: int | None = None
    found: Simulated = field(default_factory=Simulated)

    def __post_init__(self) -> None:
        self._order, self._pace = count(), Pace()
        self._running: list[tuple[float, int, _Trial]] = []
        self._idle: list[int] = []  # sizes of the actors that are kept warm, the oldest first
        self._store: dict[str, int] = {}
        self._units = self._best(None)

    def _best(self, now: int | None) -> int:
        steps = [ahead for ahead in self.policy.demand().values() if ahead > 0]
        return best_units(now, steps, self.slots, self.most, self._pace)

    def _free(self) -> int:
        return self.slots - sum(trial.units for _, _, trial in self._running)

    def _start(self, segment: Segment) -> None:
        units, waits_s = self._units, self.switch_s
        fresh = units not in self._idle
        if fresh:
            waits_s = self.restart_s
            self.found.restarts += 1
            self._pace.started(waits_s, again=True)
        else:
            self._idle.remove(units)
            self._pace.switched(waits_s)
        while sum(self._idle) > self._free() - units:
            self._idle.pop(0)
        self.policy.issue(segment.arm)
        state = None if segment.source is None else self._store[segment.source]
        self._push(_Trial(segment, state, segment.start, units, fresh), waits_s)

    def _push(self, trial: _Trial, waits_s: float = 0.0) -> None:
        steps = next_report(trial.segment, trial.step) - trial.step
        seconds = steps * self.step_s / speed(trial.units, self.efficiency)
        self.found.trained_s += trial.units * seconds
        heapq.heappush(self._running, (self.found.seconds + waits_s + seconds, next(self._order), trial))

    def _report(self) -> None:
        self.found.seconds, _, trial = heapq.heappop(self._running)
        arm, until = trial.segment.arm, next_report(trial.segment, trial.step)
        steps = until - trial.step
        self._pace.trained(trial.units, steps, steps * self.step_s / speed(trial.units, self.efficiency), trial.fresh)
        trial.state, point = self.losses.train(trial.state, trial.segment, trial.step, until)
        trial.step, trial.fresh = until, False
        self.found.steps += steps
        verdict = self.policy.report(arm, point)
        if verdict is Verdict.SAVE and not self._running and self._best(trial.units) != trial.units:
            verdict = Verdict.PAUSE
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            path = f"{arm}@{trial.step}"
            self._store[path] = trial.state
            self.policy.saved(arm, trial.step, path)
        if verdict in (Verdict.CONTINUE, Verdict.SAVE):
            self._push(trial)
        else:
            self.policy.withdraw(arm)
            self._idle.append(trial.units)

    def run(self) -> Simulated:
        """Drive the policy to its end. Raises AutoLRSError when it is not done and wants nothing."""
        while not self.policy.done:
            if not self._running and self.found.steps:
                self._units = self._best(self._units)
            while self._free() >= self._units and (wanted := self.policy.wanted()):
                self._start(wanted[0])
            if not self._running:
                raise AutoLRSError(f"nothing can make progress: {self.policy.progress()}")
            self._report()
        return self.found
