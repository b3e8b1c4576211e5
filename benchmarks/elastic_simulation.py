"""A run on a cluster that is not here: the policy and the rule for workers are the real ones, the clock is virtual."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.segments import Segment, next_report
from autolrs_ray.core.workers import Pace, fair_units, units_for


@dataclass
class Simulated:
    """steps: trained in all trials together. seconds: of wall-clock. trained_s: slot-seconds in which a worker trained, those
    that are lost to imperfect scaling among them. restarts: actors that were started, each with all its slots idle."""

    steps: int = 0
    seconds: float = 0.0
    trained_s: float = 0.0
    restarts: int = 0
    lrs: list[float] = field(default_factory=list)


def speed(units: int, efficiency: float) -> float:
    """Steps of `units` workers in the time of one of a single worker's: each further worker adds `efficiency` of one."""
    return 1.0 + efficiency * (units - 1)


@dataclass
class _Trial:
    segment: Segment
    state: Any
    step: int
    units: int


class Cluster:
    """`slots` slots; a step of one worker takes `step_s`, an actor `restart_s` to start. elastic False: one worker a trial."""

    def __init__(
        self,
        policy: Policy,
        trainer: Any,
        slots: int,
        step_s: float,
        restart_s: float,
        efficiency: float,
        elastic: bool,
    ) -> None:
        self._policy, self._trainer, self._slots, self._step_s = policy, trainer, slots, step_s
        self._restart_s, self._efficiency, self._elastic = restart_s, efficiency, elastic
        self._run, self._order, self._pace = Simulated(), count(), Pace()
        self._running: list[tuple[float, int, _Trial]] = []
        self._idle: list[int] = []  # sizes of the actors that are kept warm, the oldest first
        self._held: dict[str, int] = {}  # arm -> units at its last start
        self._store: dict[str, Any] = {}

    def _fair(self) -> dict[str, int]:
        return fair_units(self._policy.demand(), self._slots, None if self._elastic else 1)

    def _free(self) -> int:
        return self._slots - sum(trial.units for _, _, trial in self._running)

    def _chosen(self, arm: str) -> int:
        steps = self._policy.demand().get(arm, 0)
        return units_for(self._held.get(arm, 1), self._fair().get(arm, 1), steps, self._pace)

    def _start(self, segment: Segment) -> bool:
        units, free, fair = self._chosen(segment.arm), self._free(), self._fair()
        if units > free:
            too_much = any(trial.units > fair.get(trial.segment.arm, 1) for _, _, trial in self._running)
            if free < 1 or too_much:
                return False
            units = free
        waits_s = 0.0
        if units in self._idle:
            self._idle.remove(units)
        else:
            waits_s = self._restart_s
            self._run.restarts += 1
            self._pace.started(waits_s, again=True)
        while sum(self._idle) > free - units:
            self._idle.pop(0)
        self._held[segment.arm] = units
        self._policy.issue(segment.arm)
        state = None if segment.source is None else self._store[segment.source]
        self._push(_Trial(segment, state, segment.start, units), waits_s)
        return True

    def _push(self, trial: _Trial, waits_s: float = 0.0) -> None:
        steps = next_report(trial.segment, trial.step) - trial.step
        seconds = steps * self._step_s / speed(trial.units, self._efficiency)
        self._run.trained_s += trial.units * seconds
        self._pace.trained(trial.units, steps, seconds)
        heapq.heappush(self._running, (self._run.seconds + waits_s + seconds, next(self._order), trial))

    def _train(self, trial: _Trial) -> Point:
        trainer = self._trainer
        if trial.state is None:
            trainer.reset()
        else:
            trainer.load_state_dict(copy.deepcopy(trial.state))
        train_loss = trainer.train(next_report(trial.segment, trial.step), trial.segment.lr_at)
        self._run.steps += trainer.step - trial.step
        trial.step, trial.state = trainer.step, copy.deepcopy(trainer.state_dict())
        averaged = trainer.evaluate(averaged=True)["loss"] if trainer.averaging else None
        return Point(trainer.step, trainer.evaluate()["loss"], train_loss, averaged)

    def _report(self) -> None:
        self._run.seconds, _, trial = heapq.heappop(self._running)
        arm = trial.segment.arm
        verdict = self._policy.report(arm, self._train(trial))
        if verdict is Verdict.SAVE and self._chosen(arm) != trial.units:
            verdict = Verdict.PAUSE
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            path = f"{arm}@{trial.step}"
            self._store[path] = trial.state
            self._policy.saved(arm, trial.step, path)
        if verdict in (Verdict.CONTINUE, Verdict.SAVE):
            self._push(trial)
        else:
            self._policy.withdraw(arm)
            self._idle.append(trial.units)
        needed = self._policy.checkpoints()
        self._store = {path: kept for path, kept in self._store.items() if path in needed}

    def run(self) -> Simulated:
        """Drive the policy to its end. Raises AutoLRSError when it is not done and wants nothing."""
        while not self._policy.done:
            while (wanted := self._policy.wanted()) and self._free() and self._start(wanted[0]):
                pass
            if not self._running:
                raise AutoLRSError(f"nothing can make progress: {self._policy.progress()}")
            self._report()
        self._run.lrs = [e["lr"] for e in self._policy.drain_events() if e["event"] == "commit"]
        return self._run


def simulate(
    make: Callable[[int], Policy], trainer: Any, slots: int, step_s: float, restart_s: float = 3.0, efficiency: float = 1.0,
    elastic: bool = True,
) -> Simulated:  # fmt: skip
    """make: (trials side by side) -> a fresh policy."""
    return Cluster(make(slots), trainer, slots, step_s, restart_s, efficiency, elastic).run()
