"""What a race costs, in T: at the very most, and as it was measured."""

from __future__ import annotations

from autolrs_ray.core.race.plan import RacePlan

MOST_BESIDE = 4
"""Trunks that may go on from a late rung: the leader, its neighbours, and, where readings are rough, the leader before."""

USUAL = {1: (2.0, 2.0), 2: (2.0, 1.35), 3: (2.1, 1.2), 4: (2.2, 1.1), 12: (2.8, 1.05)}
"""Slots -> compute and wall-clock of races of twelve learning rates, means over 53 fields; counted in steps."""

USUAL_ALONE = (2.0, 1.3)
"""The same where slots that are left over run nothing ahead."""


def bound(num_lrs: int, plan: RacePlan, slots: int, kept: int = 0) -> tuple[float, float]:
    """The most compute and wall-clock of a race on `slots` slots, if no learning rate diverges or fails.

    kept: learning rates that are trained to the end whatever comes.

    The walk may go down to the smallest, one learning rate after another, until the last rung before the end, where a leader
    keeps getting worse; from there on those that are near one another go on.
    """
    last = plan.fractions[-2] if len(plan.fractions) > 1 else 0.0
    beside = min(MOST_BESIDE, num_lrs) if last else num_lrs
    compute = num_lrs * last + beside * (1.0 - last)
    walk = num_lrs if slots == 1 else max(1, num_lrs - 1)  # the first two train beside each other
    wall_clock = min(compute, walk * last + -(-beside // min(slots, beside)) * (1.0 - last))
    return compute + kept, wall_clock + -(-kept // slots)


def measured(slots: int, run_ahead: bool = True) -> tuple[float, float]:
    """Mean compute and wall-clock of races of twelve learning rates on `slots` slots."""
    return USUAL[max(n for n in USUAL if n <= slots)] if run_ahead or slots <= 2 else USUAL_ALONE


def usual(num_lrs: int, plan: RacePlan, slots: int, run_ahead: bool, kept: int = 0) -> tuple[float, float]:
    """Compute and wall-clock as they were measured, and of those that are kept; never above the bound."""
    compute, wall_clock = map(min, measured(slots, run_ahead), bound(num_lrs, plan, slots))
    return compute + kept, wall_clock + kept / slots
