"""What a stage-wise search costs, in T: as it mostly turns out, and at the very most."""

from __future__ import annotations

from autolrs_ray.core.paper.plan import StagePlan

MAX_ROUNDS = 2
"""Rounds of probes in a stage whose probes all diverged; each round lies two decades lower."""

MAX_ROLLBACKS = 3
"""Times the main trial may diverge in one stage before the run ends."""


def usual(plan: StagePlan, num_lrs: int, side_by_side: int, promote: bool) -> tuple[float, float]:
    """Compute and wall-clock, with `side_by_side` probes at a time, where no stage is trained again.

    promote: the winning probe's steps are the main trial's first ones.
    """
    stages = plan.stages()
    probed = sum(stage.probe_steps for stage in stages) / plan.total_steps
    again = sum(stage.probe_steps for stage in stages if promote and stage.probe_steps < stage.steps)
    given = again / plan.total_steps
    return 1.0 + num_lrs * probed - given, 1.0 + -(-num_lrs // side_by_side) * probed - given


def bound(plan: StagePlan, num_lrs: int, side_by_side: int, promote: bool) -> tuple[float, float]:
    """As if every stage were trained as often, and its probes were tried as often, as a stage may be."""
    stages = plan.stages()
    probed = (MAX_ROUNDS - 1) * sum(stage.probe_steps for stage in stages) / plan.total_steps
    trained = MAX_ROLLBACKS * sum(stage.steps for stage in stages) / plan.total_steps
    compute, wall_clock = usual(plan, num_lrs, side_by_side, promote)
    return compute + trained + num_lrs * probed, wall_clock + trained + -(-num_lrs // side_by_side) * probed
