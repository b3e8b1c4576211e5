"""Races for tests, without a warm-up unless told otherwise."""

from __future__ import annotations

from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict


def anchored(total_steps=200, lr_interval=(1e-3, 10.0), concurrency=1, **options):
    return make_policy("anchored", total_steps, lr_interval, 0, concurrency, **{"warmup": 0.0, "num_lrs": 8, **options})


def drive(policy, losses, can_save=True, every=None):
    """Run every segment wanted to its end, with loss losses(lr, step); returns what was started. Reports come at the
    boundaries, or `every` so many steps, of which the boundaries must be multiples."""
    started = []
    while not policy.done and (wanted := policy.wanted()):
        segment = wanted[0]
        started.append((segment.arm, segment.start))
        policy.issue(segment.arm)
        for step in segment.boundaries if every is None else range(segment.start + every, segment.end + 1, every):
            verdict = policy.report(segment.arm, Point(step, losses(segment.lr, step)), can_save)
            if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
                policy.saved(segment.arm, step, f"{segment.arm}@{step}")
            if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
                break
        policy.withdraw(segment.arm)
    return started
