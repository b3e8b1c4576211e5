"""How many workers a trial trains with: shares of the slots, and whether a change is worth the restart that it takes.

A unit is the least number of workers that a trial trains with; a slot has room for one unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autolrs_ray.core.checks import require_int

RESTARTS = 2
"""Restarts that a change has to earn: the one that makes it, and the one that takes it back."""


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


def fair_units(demand: Mapping[str, int], slots: int, most: int | None) -> dict[str, int]:
    """Units of every arm on `slots` slots, `most` at most: the slots in equal shares.

    demand: arm -> the steps that it is sure to train from here on. Where these are 0 (probes, and what runs ahead) it gets one.
    """
    alone = [arm for arm, steps in demand.items() if steps <= 0]
    growing = [arm for arm, steps in demand.items() if steps > 0]
    share = (slots - len(alone)) // max(1, len(growing))
    share = max(1, share if most is None else min(share, most))
    return {**dict.fromkeys(alone, 1), **dict.fromkeys(growing, share)}


@dataclass
class Pace:
    """What has been measured of a run: seconds per optimizer step by units, and seconds that a restart takes."""

    step_s: dict[int, float] = field(default_factory=dict)
    _start_s: float | None = None
    _restarts: list[float] = field(default_factory=list)

    def trained(self, units: int, steps: int, seconds: float) -> None:
        """A trial with so many units has taken `seconds` for `steps`. Half the weight is the latest stretch's."""
        if steps > 0:
            now = seconds / steps
            self.step_s[units] = (now + self.step_s.get(units, now)) / 2.0

    def started(self, seconds: float, again: bool) -> None:
        """A trial has begun to train so long after it was to; again: with other units than before."""
        if again:
            self._restarts.append(seconds)
        elif self._start_s is None:
            self._start_s = seconds

    @property
    def restart_s(self) -> float | None:
        """Mean over the changes so far; before the first one, what the run's first start took. None if nothing is known."""
        return sum(self._restarts) / len(self._restarts) if self._restarts else self._start_s

    def predicted_s(self, units: int) -> float:
        """Seconds per step with `units`: as measured, or in proportion to the nearest measured."""
        if units in self.step_s:
            return self.step_s[units]
        near = min(self.step_s, key=lambda known: (abs(known - units), known))
        return self.step_s[near] * near / units


def units_for(now: int, fair: int, steps: int, pace: Pace) -> int:
    """Units for a trial that has `now` and `steps` steps ahead: `fair`, fewer if that many are slower, or `now`.

    More than is fair is given back, whatever it costs: others need it. Any other change must save more time than RESTARTS
    restarts take.
    """
    if now > fair:
        return fair
    if not pace.step_s or pace.restart_s is None:
        return now
    options = sorted({now, fair, *(units for units in pace.step_s if units < fair)})
    best = min(options, key=lambda units: (pace.predicted_s(units), units))
    saved_s = steps * (pace.predicted_s(now) - pace.predicted_s(best))
    return best if saved_s > RESTARTS * pace.restart_s else now
