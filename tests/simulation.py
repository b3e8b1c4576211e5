"""A policy driven as the Tune pair drives it, on a toy problem: slots, any order of reports, checkpoints that get deleted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autolrs_ray.core.policy import Point, Policy, Verdict
from autolrs_ray.core.segments import Segment, next_report


@dataclass(frozen=True)
class Toy:
    """Noisy gradient descent on two quadratics; it diverges above LR 2. The noise at step t is a function of t."""

    step: int = 0
    w: tuple[float, float] = (1.0, 1.0)
    train_loss: float = math.nan

    def train(self, until: int, lr_at: Callable[[int], float]) -> Toy:
        a, b = self.w
        for t in range(self.step, until):
            lr, noise = lr_at(t), 0.3 * math.sin(12.9898 * t + 78.233)
            a, b = a - lr * (a + noise), b - lr * (0.1 * b + noise)
            if abs(a) > 1e100:
                a = b = math.inf
        return Toy(until, (a, b), 0.5 * (a * a + 0.1 * b * b) * (1.0 + 0.05 * math.sin(until)))

    @property
    def loss(self) -> float:
        a, b = self.w
        return 0.1 + 0.5 * (a * a + 0.1 * b * b)


Change = Callable[[str, Point], Point | str | None]
"""(arm, point) -> the point to report instead; "fail": the trial dies for good. None: unchanged."""


@dataclass
class Simulation:
    """Trials run on `slots` slots; `order` picks the one that reports next. `change` puts trouble in its way. every: steps
    between reports; 0: they come where they are due."""

    policy: Policy
    slots: int = 1
    every: int = 0
    order: np.random.Generator | None = None
    change: Change = lambda arm, point: None
    can_save: Callable[[str, int], bool] = lambda arm, step: True
    toy: Toy = field(default_factory=Toy)
    running: dict[str, tuple[Segment, Toy]] = field(default_factory=dict)
    store: dict[str, Toy] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    started: list[Segment] = field(default_factory=list)
    verdicts: list[tuple[str, int, Verdict]] = field(default_factory=list)
    trained: int = 0
    writes: int = 0

    def fill(self) -> None:
        """Start wanted segments on free slots."""
        while len(self.running) < self.slots:
            wanted = self.policy.wanted()
            if not wanted:
                return
            segment = wanted[0]
            assert segment.arm not in self.running, f"{segment.arm} was issued and is wanted again"
            self.policy.issue(segment.arm)
            toy = self.toy if segment.source is None else self.store[segment.source]  # KeyError: deleted too early
            assert toy.step == segment.start
            self.running[segment.arm] = (segment, toy)
            self.started.append(segment)

    def act(self) -> None:
        """One report of one running trial, and what follows from it."""
        self.fill()
        arms = sorted(self.running)
        assert arms, f"nothing can make progress: {self.policy.progress()}"
        arm = arms[0] if self.order is None else arms[int(self.order.integers(len(arms)))]
        segment, before = self.running[arm]
        until = (before.step // self.every + 1) * self.every if self.every else next_report(segment, before.step)
        toy = before.train(until, segment.lr_at)
        self.trained += toy.step - before.step
        self.running[arm] = (segment, toy)
        point = Point(toy.step, toy.loss, toy.train_loss, toy.loss, val_batches=8.0)
        changed = self.change(arm, point)
        if changed == "fail":
            self.leave(arm)
            self.policy.failed(arm, "the test says so")
            return
        point = changed if isinstance(changed, Point) else point
        can_save = self.can_save(arm, toy.step)
        verdict = self.policy.report(arm, point, can_save)
        self.verdicts.append((arm, toy.step, verdict))
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            assert can_save, f"{verdict} of a state that cannot be saved"
            self.save(arm, toy)
        if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
            self.leave(arm)
        self.tidy()

    def save(self, arm: str, toy: Toy) -> None:
        self.writes += 1
        path = f"{arm}@{toy.step}#{self.writes}"
        self.store[path] = toy
        self.policy.saved(arm, toy.step, path)

    def leave(self, arm: str) -> None:
        del self.running[arm]
        self.policy.withdraw(arm)

    def tidy(self) -> None:
        """Delete what the policy does not need, end trials of arms that are closed, collect events."""
        needed = self.policy.checkpoints()
        assert needed <= set(self.store), f"needs checkpoints that were never written: {needed - set(self.store)}"
        self.store = {path: toy for path, toy in self.store.items() if path in needed}
        for arm in [arm for arm in self.running if not self.policy.is_open(arm)]:
            self.leave(arm)
        self.events += self.policy.drain_events()

    def interrupt(self, policy: Policy) -> None:
        """All trials are lost; the run goes on with `policy`, which gets the state through JSON."""
        self.events += self.policy.drain_events()
        policy.load_state_dict(json.loads(json.dumps(self.policy.state_dict(), allow_nan=False)))
        self.policy, self.running = policy, {}
        self.tidy()

    def run(self, limit: int = 100_000) -> Simulation:
        for _ in range(limit):
            if self.policy.done:
                self.events += self.policy.drain_events()
                return self
            self.act()
        raise AssertionError(f"no end after {limit} reports: {self.policy.progress()}")

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in names]


def diverging(above: float, after: int = 0, to: float = math.nan) -> Callable[[Simulation], Change]:
    """Reports of trials whose LR is above `above` become `to` after step `after`."""

    def bind(simulation: Simulation) -> Change:
        def change(arm: str, point: Point) -> Point | None:
            lr = simulation.running[arm][0].lr
            return replace(point, loss=to, averaged_loss=to) if lr > above and point.step > after else None

        return change

    return bind
