"""Learning rates that a user has named: they race beside those of the grid, and may be trained to the end whatever comes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from autolrs_ray.core.checks import SAME_LR
from autolrs_ray.core.race.trunk import Trunk


def field_of(grid: Iterable[float], own: Sequence[float]) -> list[Trunk]:
    """The trunks of a race, the smallest LR first: the `grid`, and one's own, which take the place of equal ones."""
    others = [lr for lr in grid if not any(math.isclose(lr, point, rel_tol=SAME_LR) for point in own)]
    return [Trunk(lr) for lr in sorted([*others, *own])]


def on_the_way(trunks: list[Trunk], kept: Sequence[float], total_steps: int) -> list[int]:
    """Those of the LRs `kept` that are to come to the end, and have not."""
    return [i for i, t in enumerate(trunks) if t.lr in kept and t.active and t.step < total_steps]


def arrived(trunks: list[Trunk], kept: Sequence[float], total_steps: int) -> list[Trunk]:
    """Those of the LRs `kept` that have come to the end."""
    return [t for t in trunks if t.lr in kept and not t.broken and t.step >= total_steps]


def best_at_the_end(trunks: Iterable[Trunk], last: float) -> Trunk:
    """The one with the best reading at the rung `last`, the run's end; of equals, the first."""
    readings = [(trunk, trunk.readings[last]) for trunk in trunks]
    return min(((r.score if r.final is None else r.final, i, t) for i, (t, r) in enumerate(readings)))[2]
