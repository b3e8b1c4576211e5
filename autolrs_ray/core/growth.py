"""How the batch of a step grows as a run goes on: by whole multiples, at the same learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from autolrs_ray.core.checks import conforming, require_float, require_int

MOST = 64
"""Largest multiple of the batch that is taken for meant."""


def require_growth(growth: Any) -> dict[float, int]:
    """`growth` as {share of the run: multiple of the batch from there on}, in order. None: the batch stays as it is.

    Raises TypeError or ValueError, naming the value, for anything else, and for a batch that would shrink.
    """
    if growth is None:
        return {}
    pairs = list(growth.items()) if isinstance(growth, Mapping) else growth
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise TypeError(
            f"batch_growth must say from which share of the run on the batch is how many times as large, as {{0.5: 2}}, "
            f"got {growth!r}"
        )
    found: dict[float, int] = {}
    for share, factor in sorted(pairs, key=lambda pair: float(pair[0]) if _real(pair[0]) else 0.0):
        if require_float("each share of batch_growth", share, 0.0, 1.0, low_open=True) == 1.0:
            raise ValueError(f"batch_growth has nothing to do at the end of a run, got {growth!r}")
        found[float(share)] = require_int(f"the multiple of the batch from {share:g} of the run on", factor, 2)
    if any(later <= earlier for earlier, later in pairwise(found.values())) or len(found) < len(pairs):
        raise ValueError(f"batch_growth must rise from share to share, got {growth!r}")
    if max(found.values(), default=0) > MOST:
        raise ValueError(f"batch_growth grows the batch {MOST} times at most, got {growth!r}")
    return found


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class BatchGrowth:
    """points: (step from which on, batches of the task's size that one step takes), in order.

    A step takes its batches from the same row of batches that a run without growth goes through, one after another: all of
    their rows are new.
    """

    points: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, growth: Mapping[float, int], total_steps: int) -> BatchGrowth:
        """Of shares of a run of `total_steps`."""
        return cls(tuple((round(share * total_steps), factor) for share, factor in growth.items()))

    @classmethod
    def from_config(cls, points: Iterable[Iterable[int]]) -> BatchGrowth:
        """Of JSON lists."""
        return cls(tuple((int(step), int(factor)) for step, factor in points))

    @classmethod
    def from_file(cls, points: Any) -> BatchGrowth:
        """Of JSON values that anybody may have written. Raises ValueError for what is no growth, as `require_growth` does."""
        found = cls(tuple(conforming("batch_growth", points, list[tuple[int, int]])))
        for step, factor in found.points:
            require_int("each step of batch_growth", step, 0)
            require_int(f"the multiple of the batch from step {step} on", factor, 2, MOST)
        if any(later < earlier or more <= less for (earlier, less), (later, more) in pairwise(found.points)):
            raise ValueError(f"batch_growth must rise from step to step, got {points!r}")
        return found

    def factor(self, step: int) -> int:
        """Batches that the update from `step` to `step + 1` takes."""
        return max((factor for start, factor in self.points if start <= step), default=1)

    def first(self, step: int) -> int:
        """Batches that the steps before `step` have taken, which is the number of the first one that it takes."""
        before = ((0, 1), *self.points)
        marks = [min(start, step) for start, _ in before] + [step]
        return sum(factor * (high - low) for (_, factor), (low, high) in zip(before, pairwise(marks), strict=True))
