"""Drives a policy in a plain loop: one process, one trial at a time, checkpoints in memory. No Ray.

The outcome is that of the Tune pair at the same `policy.concurrency`, because proposals and decisions depend on results
and not on the order in which they arrive. It serves small experiments, comparisons over many seeds, and the tests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.segments import Segment, next_report
from autolrs_ray.training.trainer import Trainer


@dataclass
class LocalRun:
    """What a local run leaves: the policy's events, the steps trained in all trials together, and the final state."""

    events: list[dict[str, Any]] = field(default_factory=list)
    trained_steps: int = 0
    final_state: dict[str, Any] | None = None


def run_local(policy: Policy, trainer: Trainer) -> LocalRun:
    """Run `policy` to its end on `trainer`, which is left in the final state.

    Raises AutoLRSError where the policy gives up, or when it is not done and wants nothing.
    """
    run = LocalRun()
    if policy.growth.points:
        trainer.grow(policy.growth)
    store: dict[str, Any] = {}
    while not policy.done:
        wanted = policy.wanted()
        if not wanted:
            raise AutoLRSError(f"nothing can make progress: {policy.progress()}")
        segment = wanted[0]
        policy.issue(segment.arm)
        if segment.source is None:
            trainer.reset()
        else:
            trainer.load_state_dict(copy.deepcopy(store[segment.source]))
        _train(policy, trainer, segment, store, run)
        policy.withdraw(segment.arm)
        run.events += policy.drain_events()
        needed = policy.checkpoints()
        store = {path: state for path, state in store.items() if path in needed}
    last = next(event for event in reversed(run.events) if event["event"] == Event.DONE)
    run.final_state = store[last["checkpoint"]]
    trainer.load_state_dict(copy.deepcopy(run.final_state))
    return run


def _train(policy: Policy, trainer: Trainer, segment: Segment, store: dict[str, Any], run: LocalRun) -> None:
    """Train `segment` until the policy's verdict takes it off the machine."""
    while True:
        before = trainer.step
        train_loss = trainer.train(next_report(segment, before), segment.lr_at)
        run.trained_steps += trainer.step - before
        averaged = trainer.evaluate(averaged=True)["loss"] if trainer.averaging else None
        size = getattr(trainer, "val_batches", None)  # a stand-in for a Trainer need not have it
        point = Point(trainer.step, trainer.evaluate()["loss"], train_loss, averaged, val_batches=size)
        verdict = policy.report(segment.arm, point)
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            path = f"{segment.arm}@{trainer.step}"
            store[path] = copy.deepcopy(trainer.state_dict())
            policy.saved(segment.arm, trainer.step, path)
        if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
            return
