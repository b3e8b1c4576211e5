"""The untrained model that a race counts progress from, and when it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from autolrs_ray.core.checks import conforming
from autolrs_ray.core.policy import Point
from autolrs_ray.core.race.plan import FIRST_READINGS, RacePlan
from autolrs_ray.core.race.readings import score_of, untrained_by
from autolrs_ray.core.race.rule import Untrained
from autolrs_ray.core.race.trunk import Trunk


def baseline_of(trunks: list[Trunk]) -> int | None:
    """The smallest LR that has not come to grief: what it reads at first is an untrained model's."""
    return next((i for i, trunk in enumerate(trunks) if not trunk.broken), None)


@dataclass
class Baseline:
    """early: the first reports of the smallest LR, until they are enough to say what an untrained model reads. moved: their
    scores were not all the same."""

    untrained: Untrained | None = None
    early: list[Point] = field(default_factory=list)
    moved: bool = False

    @property
    def known(self) -> bool:
        return self.untrained is not None

    def hear(self, point: Point) -> None:
        """Note a report of the smallest LR."""
        self.early = [*(earlier for earlier in self.early if earlier.step < point.step), point]

    def conclude(self, at_last: bool = False) -> None:
        """Once FIRST_READINGS have come, that is the untrained model. at_last: however few have come."""
        if self.untrained is None and self.early and (len(self.early) >= FIRST_READINGS or at_last):
            self.untrained = untrained_by(self.early)
            self.moved = len({score_of(point) for point in self.early}) > 1
            self.early = []

    def stand_in(self, trunk: Trunk | None, plan: RacePlan) -> None:
        """The smallest LR has come to grief: `trunk`, the next, stands in for it, which may have been read already."""
        readings = {} if trunk is None else trunk.readings
        self.early = [Point(plan.step(rung), r.score, r.train) for rung, r in readings.items()]
        self.conclude()

    def state_dict(self) -> dict[str, Any]:
        early = [{k: v for k, v in vars(point).items() if v is not None and math.isfinite(v)} for point in self.early]
        return dict(untrained=None if self.untrained is None else vars(self.untrained), early=early)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Baseline:
        """Raises ValueError, naming it, for what none can be."""
        untrained: Untrained | None = conforming("untrained", state["untrained"], Untrained | None)
        return cls(untrained, [_point(early) for early in conforming("early", state["early"], list[Any])])


def _point(state: Any) -> Point:
    """A report out of `state`, which leaves out what was not finite."""
    point: Point = conforming("early report", {"loss": 0.0, **state} if isinstance(state, dict) else state, Point)
    return point if "loss" in state else replace(point, loss=math.inf)
