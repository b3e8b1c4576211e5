"""Which trunks free slots run ahead, in case the walk comes to them."""

from __future__ import annotations

from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.rule import Course
from autolrs_ray.core.race.trunk import Trunk

AHEAD_UNTIL = 0.12
"""Share of the run up to which free slots run trunks ahead."""


def ahead_of(trunks: list[Trunk], course: Course, plan: RacePlan, walking_from_top: bool, slots: int) -> list[int]:
    """Trunks that `slots` slots which the rule leaves over run ahead: the next below those in play, the nearest first.

    walking_from_top: nothing has been decided: the smallest LR is in play for what an untrained model reads, and is no bound.
    """
    settled = bool(course.decisions) and course.decisions[-1].rung >= plan.settled
    if settled or course.winner is not None:
        return []
    lowest = max(course.play, default=0) if walking_from_top else min(course.play, default=0)
    nearest = [i for i in reversed(range(lowest)) if trunks[i].active and i not in course.play][:slots]
    end = max((step for step in plan.steps if step <= round(AHEAD_UNTIL * plan.total_steps)), default=0)
    return [i for i in nearest if trunks[i].front(plan) < end]
