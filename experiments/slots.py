"""Drives a policy as the Ray Tune pair does on `slots` free slots, with a virtual clock in optimizer steps.

The clock counts training steps only: evaluating, checkpointing and starting trials cost nothing here. For the paper's
policy the result is the closed form: sum over stages of tau + ceil(k / q) * tau' less the promoted tau', over T, which is
1 + (k / q - 1) * tau' / tau. For the race it depends on who is dropped when, hence the simulation.
"""

from __future__ import annotations

import copy
import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.segments import Segment, next_report


@dataclass
class SlotRun:
    """events: the policy's. steps: trained in all trials together; one whose batch has grown counts as many times. clock: steps
    of wall-clock, the end of the run."""

    events: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    clock: int = 0


def run_slots(policy: Policy, trainer: Any, slots: int, every: int = 0) -> SlotRun:
    """Run `policy` to its end on `slots` slots; `trainer` is left in the final state. every: steps between reports, of a
    trainable whose step() is so long; 0: they come where they are asked for.

    A trial that was dropped while it trains learns it at its next report, as in the pair.
    Raises AutoLRSError where the policy gives up, or when it is not done and wants nothing.
    """
    run, free, order = SlotRun(), slots, count()
    policy.set_concurrency(slots)
    if policy.growth.points:
        trainer.grow(policy.growth)
    store: dict[str, Any] = {}
    running: list[tuple[int, int, Segment, Any, int]] = []  # time of the next report, tie-break, segment, state, step

    def report_after(segment: Segment, step: int) -> int:
        return (step // every + 1) * every if every else next_report(segment, step)

    def push(segment: Segment, state: Any, step: int) -> None:
        heapq.heappush(running, (run.clock + report_after(segment, step) - step, next(order), segment, state, step))

    while not policy.done:
        while free and (wanted := policy.wanted()):
            policy.issue(wanted[0].arm)
            source = wanted[0].source
            push(wanted[0], store[source] if source is not None else None, wanted[0].start)
            free -= 1
        if not running:
            raise AutoLRSError(f"nothing can make progress: {policy.progress()}")
        run.clock, _, segment, state, step = heapq.heappop(running)
        if state is None:
            trainer.reset()
        else:
            trainer.load_state_dict(copy.deepcopy(state))
        train_loss = trainer.train(report_after(segment, step), segment.lr_at)
        run.steps += policy.growth.first(trainer.step) - policy.growth.first(step)
        averaged = trainer.evaluate(averaged=True)["loss"] if trainer.averaging else None
        size = getattr(trainer, "val_batches", None)
        point = Point(trainer.step, trainer.evaluate()["loss"], train_loss, averaged, val_batches=size)
        verdict = policy.report(segment.arm, point)
        state = copy.deepcopy(trainer.state_dict())
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            path = f"{segment.arm}@{trainer.step}"
            store[path] = state
            policy.saved(segment.arm, trainer.step, path)
        if verdict in (Verdict.CONTINUE, Verdict.SAVE):
            push(segment, state, trainer.step)
        else:
            policy.withdraw(segment.arm)
            free += 1
        run.events += policy.drain_events()
        needed = policy.checkpoints()
        store = {path: kept for path, kept in store.items() if path in needed}
    last = next(event for event in reversed(run.events) if event["event"] == "done")
    trainer.load_state_dict(copy.deepcopy(store[last["checkpoint"]]))
    return run
