"""How long the segments of a run take, for the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from autolrs_ray.core.policy import Verdict
from autolrs_ray.driver.searcher import AutoLRSSearch


@dataclass
class _Clock:
    """When a segment's first step began, by the wall clock, and the seconds its trial has trained and evaluated."""

    began: float
    busy_s: float = 0.0


class Clocks:
    """One for every trial that trains a segment."""

    def __init__(self) -> None:
        self._clocks: dict[str, _Clock] = {}

    def drop(self, trial_id: str) -> None:
        """The trial is gone, or starts anew."""
        self._clocks.pop(trial_id, None)

    def heard(self, search: AutoLRSSearch, trial_id: str, verdict: Verdict, result: dict[str, Any]) -> None:
        """Journal when a segment ran and how long it was busy, once it ends."""
        now, busy_s = time.time(), float(result.get("time_this_iter_s") or 0.0)
        clock = self._clocks.setdefault(trial_id, _Clock(now - busy_s))
        clock.busy_s += busy_s
        if verdict in (Verdict.CONTINUE, Verdict.SAVE):
            return
        del self._clocks[trial_id]
        segment = search.segments[search.arm_of[trial_id]]
        search.note("segment", time=now, arm=segment.arm, role=segment.role, stage=segment.stage, lr=segment.lr,
                    start=segment.start, end=result[search.time_attr], began=clock.began, busy_s=clock.busy_s)  # fmt: skip
