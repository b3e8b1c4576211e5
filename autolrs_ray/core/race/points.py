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


def arrived(trunks: list[Trunk], kept: Sequence[float], total_steps: int) -> list[int]:
    """Those of the LRs `kept` that have come to the end."""
    return [i for i, t in enumerate(trunks) if t.lr in kept and not t.broken and t.step >= total_steps]


def best_at_the_end(trunks: list[Trunk], among: set[int], last: float) -> int:
    """The one with the best reading at the rung `last`, the run's end; of equals, the rule's own way to tell them."""
    readings = {i: trunks[i].readings[last] for i in among}
    return min(
        sorted(among, reverse=True), key=lambda i: (r.score if (r := readings[i]).final is None else r.final, r.score)
    )
