"""How long the segments of a run take, for the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import Verdict
from autolrs_ray.driver.desk import Desk


@dataclass
class _Clock:
    """When a segment's first step began, by the wall clock, the step it has come to, and the seconds its trial has trained and
    evaluated."""

    began: float
    step: int
    busy_s: float = 0.0


class Clocks:
    """One for every trial that trains a segment."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._clocks: dict[str, _Clock] = {}

    def drop(self, trial_id: str) -> None:
        """The trial is gone, or starts anew."""
        self._clocks.pop(trial_id, None)

    def heard(self, trial_id: str, step: int, verdict: Verdict, result: dict[str, Any]) -> None:
        """Journal when a segment ran and how long it was busy, once it ends."""
        now, busy_s = time.time(), float(result.get("time_this_iter_s") or 0.0)
        clock = self._clocks.setdefault(trial_id, _Clock(now - busy_s, self._desk.segment(trial_id).start))
        clock.busy_s += busy_s
        self._desk.trained(step - clock.step, busy_s)
        clock.step = step
        if verdict in (Verdict.CONTINUE, Verdict.SAVE):
            return
        del self._clocks[trial_id]
        segment = self._desk.segment(trial_id)
        self._desk.note(Event.SEGMENT, time=now, arm=segment.arm, role=segment.role, stage=segment.stage, lr=segment.lr,
                        start=segment.start, end=step, began=clock.began, busy_s=clock.busy_s,
                        workers=self._desk.capacity.workers(trial_id))  # fmt: skip
