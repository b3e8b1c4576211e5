"""What a race goes by: its rungs, as shares of the run and as steps, and the few numbers of its rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from autolrs_ray.core.checks import conforming, require_float, require_int

RUNGS: tuple[float, ...] = (0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.5, 0.64, 0.8, 1.0)
"""Shares of the run at which the race compares its trunks."""

UNRISEN = 0.06
"""The first rung of a race without a rise, and the last that waits for more than one report of the smallest LR."""

FIRST_READINGS = 4
"""Reports of the smallest LR that say how far an untrained model's losses scatter; fewer do not."""


@dataclass(frozen=True)
class RacePlan:
    """Rungs of a race, and how its rule judges at them; :mod:`autolrs_ray.core.race.rule` says what the numbers mean.

    fractions: the rungs as nominal shares of the run, which the rule reads; steps: the same in optimizer steps, where they are
    taken. rise: the share over which the learning rate rises. patience: 1 keeps the leader of the rung before in play.
    """

    total_steps: int
    fractions: tuple[float, ...]
    steps: tuple[int, ...]
    rise: float = 0.2
    settled: float = 0.3
    close: float = 0.04
    patience: int = 0

    @classmethod
    def of(
        cls, total_steps: int, fractions: tuple[float, ...] | None = None, rise: float = 0.2, **rule: Any
    ) -> RacePlan:
        """Rungs at `fractions` of `total_steps`, the last at its end. Of fractions that fall on one step the latest is kept.

        None: those of RUNGS; without a rise from UNRISEN on only: a large learning rate at full height needs time.
        """
        require_int("total_steps", total_steps, 2)
        if fractions is None:
            fractions = RUNGS if rise else tuple(fraction for fraction in RUNGS if fraction >= UNRISEN)
        for fraction in fractions:
            require_float("each rung", fraction, 0.0, 1.0, low_open=True)
        if not fractions or list(fractions) != sorted(set(fractions)) or fractions[-1] != 1.0:
            raise ValueError(f"rungs must be increasing fractions of the run that end at 1, got {fractions}")
        nominal = {max(1, round(fraction * total_steps)): fraction for fraction in fractions}
        return cls(total_steps, tuple(nominal.values()), tuple(nominal), rise, **rule)

    def reported_every(self, steps: int) -> RacePlan:
        """The plan for a trainable that reports every so many steps: of rungs that one report passes, the last, where that
        report is."""
        nominal = {
            min(self.total_steps, math.ceil(step / steps) * steps): fraction
            for fraction, step in zip(self.fractions, self.steps, strict=True)
        }
        return replace(self, fractions=tuple(nominal.values()), steps=tuple(nominal))

    def passed(self, before: int, step: int) -> int:
        """How many rungs lie between two reports, or at the second."""
        return sum(before < rung <= step for rung in self.steps)

    @property
    def first(self) -> float:
        """The rung by which FIRST_READINGS reports are asked of the smallest LR: the first with as many steps."""
        return next((at for at, step in zip(self.fractions, self.steps, strict=True) if step >= FIRST_READINGS), 1.0)

    def step(self, fraction: float) -> int:
        """The step of the rung at `fraction`."""
        return self.steps[self.fractions.index(fraction)]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RacePlan:
        """Raises ValueError for what no plan can be."""
        plan: RacePlan = conforming("plan", state, cls)
        for rungs in (plan.fractions, plan.steps):
            if len(rungs) != len(plan.steps) or list(rungs) != sorted({*rungs}) or not rungs or rungs[0] <= 0:
                raise ValueError(f"rungs of a race cannot be {rungs}")
        return plan
