"""How many workers the trials of a run train with: side by side on shares of the slots, or in turns on all of them.

A unit is the least number of workers that a trial trains with; a slot has room for one unit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from autolrs_ray.core.checks import require_int

RESTARTS = 2
"""Restarts that a change of size has to earn: the one that makes it, and the one that takes it back."""


def parse_workers(workers: int | str | tuple[int, int]) -> tuple[int, int | None]:
    """(least, most) of `workers`: a number, "elastic" for one and as many as fit (None), or both.

    Raises TypeError or ValueError, naming the value, for anything else.
    """
    if workers == "elastic":
        return 1, None
    if isinstance(workers, (tuple, list)):
        if len(workers) != 2:
            raise ValueError(f"workers must be a number, 'elastic' or (least, most), got {workers!r}")
        least, most = (require_int(name, value, 1) for name, value in zip(("least", "most"), workers, strict=True))
        if most < least:
            raise ValueError(f"workers=(least, most) must not fall, got {workers!r}")
        if most % least:
            raise ValueError(
                f"trials grow in multiples of the least, so most must be one of them, got workers={workers!r}"
            )
        return least, most
    if isinstance(workers, str):
        raise ValueError(f"workers must be a number, 'elastic' or (least, most), got {workers!r}")
    return require_int("workers", workers, 1), workers


@dataclass
class Pace:
    """What has been measured of a run: seconds per optimizer step by units, and seconds that a restart takes.

    switch_s: seconds between two trials in one actor; 0 where that has not been seen.
    """

    step_s: dict[int, float] = field(default_factory=dict)
    switch_s: float = 0.0
    _rough: set[int] = field(default_factory=set)
    _start_s: float | None = None
    _restarts: list[float] = field(default_factory=list)

    def trained(self, units: int, steps: int, seconds: float, first: bool = False) -> None:
        """A trial with so many units has taken `seconds` for `steps`. Half the weight is the latest stretch's.

        first: since its actor was started; memory is taken and kernels are chosen then, so that the next one replaces it.
        """
        if steps <= 0 or (first and units in self.step_s):
            return
        now = seconds / steps
        self.step_s[units] = now if units in self._rough else (now + self.step_s.get(units, now)) / 2.0
        (self._rough.add if first else self._rough.discard)(units)

    def switched(self, seconds: float) -> None:
        """A trial has begun to train so long after it was to, in an actor that another one has left."""
        self.switch_s = (seconds + (self.switch_s or seconds)) / 2.0

    def started(self, seconds: float, again: bool) -> None:
        """A trial has begun to train so long after it was to, in a new actor; again: with other units than before."""
        if again:
            self._restarts.append(seconds)
        elif self._start_s is None:
            self._start_s = seconds

    def knows(self, units: int) -> bool:
        """Whether it has been measured, with all warmed up."""
        return units in self.step_s and units not in self._rough

    @property
    def restart_s(self) -> float | None:
        """Mean over the changes so far; before the first one, what the run's first start took. None if nothing is known."""
        return sum(self._restarts) / len(self._restarts) if self._restarts else self._start_s

    def predicted_s(self, units: int) -> float:
        """Seconds per step with `units`: as measured, or in proportion to the nearest measured; to one unit's if none is."""
        if not self.step_s:
            return 1.0 / units
        near = min(self.step_s, key=lambda known: (abs(known - units), known))
        return self.step_s[near] * near / units


def makespan(steps: Collection[int], lanes: int) -> int:
    """Steps after which trials with so many `steps` ahead are all through, on `lanes` lanes, the longest first."""
    load = [0] * min(lanes, max(1, len(steps)))
    for ahead in sorted(steps, reverse=True):
        load[load.index(min(load))] += ahead
    return max(load)


def best_units(now: int | None, steps: Collection[int], slots: int, most: int | None, pace: Pace) -> int:
    """Units with which the trials in play are through soonest on `slots` slots, side by side or in turns.

    now: what they train with; None if none has begun, or if actors have to be started in any case. steps: that each is sure to
    train from here on, with the others. most: units that one can use at most.

    With as many units as slots they take turns, and no slot idles; with fewer, slots // units train side by side, which is
    sooner where workers hold each other up, or where turns are short. A change must save more time than RESTARTS restarts
    take, and of sizes that are equal the smallest is taken.
    """
    limit = slots if most is None else min(slots, most)
    stays = now is not None and now <= limit
    if stays and (not steps or not pace.knows(now or 0) or pace.restart_s is None):
        return now or 1
    shares = {min(limit, slots // lanes) for lanes in range(1, len(steps) + 1) if lanes <= slots}
    known = {units for units in (*pace.step_s, now or 1) if units <= limit}
    restart_s = RESTARTS * (pace.restart_s or 0.0) if stays else 0.0

    def seconds(units: int) -> float:
        turns = max(0, len(steps) - slots // units)
        taken = makespan(steps, slots // units) * pace.predicted_s(units) + turns * pace.switch_s
        return taken if units == now else taken + restart_s

    return min(sorted(shares | known), key=lambda units: (float(f"{seconds(units):.9g}"), units != now, units))
