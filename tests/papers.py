"""Runs of the paper's policy for tests: a hundred steps in stages of 20 and 40, unless told otherwise."""

from __future__ import annotations

import math

from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point
from autolrs_ray.core.segments import next_report

OPTIONS = dict(stage_steps=20, max_stage_steps=40, probe_steps=5, num_lrs=4)


def paper(total_steps=100, lr_interval=(1e-3, 1.0), seed=3, concurrency=1, **options):
    return make_policy("paper", total_steps, lr_interval, seed, concurrency, **{**OPTIONS, **options})


def finish_probe(policy, segment, losses, train_losses=None, can_save=True):
    """Report `losses` at the steps where `segment` wants reports; return the last verdict."""
    step = segment.start
    for i, loss in enumerate(losses):
        step = next_report(segment, step)
        train = train_losses[i] if train_losses is not None else None
        verdict = policy.report(segment.arm, Point(step, loss, train), can_save)
    return verdict


def decaying(level, n=5):
    return [level + math.exp(-i) for i in range(n)]


def into_the_second_stage(loss, first_losses=(1.2, 1.5, 2.0, 8.0)):
    """A policy whose first stage began at `first_losses`, one per probe, and ended at `loss`."""
    policy = paper(initial="grid", promote=False)
    for i, first in enumerate(first_losses):
        (segment,) = policy.wanted()
        finish_probe(policy, segment, [first, *decaying(1.0 + i, 4)])
    policy.report("main", Point(20, loss))
    policy.saved("main", 20, "main@20")
    return policy
