"""The rungs of the race: frozen, validated values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autolrs_ray.core.checks import require_float, require_int

RUNGS: tuple[float, ...] = (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.75)
"""Fractions of the total steps at which the race compares its trunks."""

TOLERANCES: tuple[float, ...] = (0.01,) * 5 + (0.005,) * 5
"""How much worse than the leader (relative score) an LR may be at each rung and still go on, whichever it is."""

THRIFTY_RUNGS: tuple[float, ...] = (0.01, *RUNGS)
THRIFTY_TOLERANCES: tuple[float, ...] = (0.005,) * len(THRIFTY_RUNGS)


@dataclass(frozen=True)
class RacePlan:
    """Rungs of the opening race, in steps, with the tolerance at each. The last step of the run is no rung."""

    total_steps: int
    rungs: tuple[int, ...]
    tolerances: tuple[float, ...]

    @classmethod
    def from_fractions(
        cls, total_steps: int, fractions: tuple[float, ...] = RUNGS, tolerances: tuple[float, ...] = TOLERANCES
    ) -> RacePlan:
        """Rungs at `fractions` of `total_steps`; fractions that fall on the same step are merged (the later wins)."""
        require_int("total_steps", total_steps, 2)
        if len(fractions) != len(tolerances) or not fractions:
            raise ValueError(f"rungs and tolerances must have the same length >= 1, got {fractions}, {tolerances}")
        for fraction in fractions:
            require_float("each rung", fraction, 0.0, 1.0, low_open=True)
        for tolerance in tolerances:
            require_float("each tolerance", tolerance, 0.0, math.inf)
        if list(fractions) != sorted(set(fractions)):
            raise ValueError(f"rungs must be increasing fractions of the run, got {fractions}")
        merged: dict[int, float] = {}
        for fraction, tolerance in zip(fractions, tolerances, strict=True):
            merged[max(1, round(fraction * total_steps))] = tolerance
        steps = tuple(step for step in sorted(merged) if step < total_steps)
        return cls(total_steps, steps, tuple(merged[step] for step in steps))
