"""Races for tests, of eight learning rates unless told otherwise."""

from __future__ import annotations

from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict


def anchored(total_steps=200, lr_interval=(1e-3, 10.0), concurrency=1, **options):
    return make_policy("anchored", total_steps, lr_interval, 0, concurrency, **{"warmup": 0.2, "num_lrs": 8, **options})


def start(policy, loss=3.0, train_loss=None):
    """The smallest LR reports an untrained model's losses, up to the first rung."""
    rung = policy.plan.steps[0]
    for step in sorted({max(1, rung * part // 4) for part in range(1, 5)}):
        policy.report("t00", Point(step, loss, train_loss))
    policy.saved("t00", rung, f"t00@{rung}")


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


def alternating(now, steps, slots, most, pace):
    """In place of `best_units`, whatever the clocks say: one unit and as many as fit by turns, as the steps ahead change."""
    limit = slots if most is None else min(slots, most)
    return limit if sum(steps) // 3 % 2 == 0 else 1
