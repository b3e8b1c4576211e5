"""The race itself: its trunks, what has been read of them at the rungs, and what follows from that by the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from autolrs_ray.core.checks import conforming, require_int
from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import Point, finite_or_inf, refuse_ignored_lr
from autolrs_ray.core.race.baseline import Baseline, baseline_of
from autolrs_ray.core.race.plan import UNRISEN, RacePlan
from autolrs_ray.core.race.readings import final_of, score_of
from autolrs_ray.core.race.rule import Course, Reading, walk
from autolrs_ray.core.race.trouble import caveat, forgive, none_left
from autolrs_ray.core.race.trunk import ENDED, Trunk

MANY = 1000
"""More learning rates, or checkpoints of one, than that nobody means."""


def arm_of(i: int) -> str:
    """The arm of trunk number `i`, the smallest learning rate's first."""
    return f"t{i:02d}"


@dataclass
class Race:
    """kept: learning rates that are trained to the end whatever comes. decided: how many decisions have been announced."""

    plan: RacePlan
    trunks: list[Trunk]
    emit: Callable[..., None] = field(repr=False)
    kept: Sequence[float] = ()
    baseline: Baseline = field(default_factory=Baseline)
    decided: int = 0
    course: Course = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.follow(self.plan)

    def follow(self, plan: RacePlan) -> None:
        """Race by `plan`. What has been read at rungs that it has not goes to the next that it has: training losses, since
        those are means since the rung before, and who has come to grief."""
        self.plan = plan
        for trunk in self.trunks:
            found, first = {}, None
            for rung, reading in sorted(trunk.readings.items()):
                first = first or reading
                to = next(at for at in plan.fractions if at >= rung)
                if rung == to or not math.isfinite(reading.score):
                    found[to], first = replace(reading, train=first.train), None
            trunk.readings = found
        self._walk()

    def _walk(self) -> None:
        """Ask the rule how far what has been read carries the race."""
        self.course = walk([trunk.readings for trunk in self.trunks], self.baseline.untrained, self.plan)

    def hear(self, i: int, point: Point, before: int) -> None:
        """A report of trunk `i`; the report before was at step `before`. Its readings at the rungs in between are noted. If
        those of the smallest LR pass several rungs, as one an epoch may, there are fewer rungs from then on."""
        trunk, since, steps = self.trunks[i], 0, [0]
        if not self.baseline.known and i == baseline_of(self.trunks):
            self.baseline.hear(point)
            steps += [early.step for early in self.baseline.early]
        for rung, step in zip(self.plan.fractions, self.plan.steps, strict=True):
            if before < step <= point.step and rung not in trunk.readings:
                self._read(i, rung, since, point)
            since = step
        apart = max((b - a for a, b in pairwise(steps) if self.plan.passed(a, b) > 1), default=0)
        if apart and self.baseline.known:
            self.follow(self.plan.reported_every(apart))

    def _read(self, i: int, rung: float, since: int, point: Point) -> None:
        """Note what trunk `i` reads at `rung`; the rung before lies at step `since`."""
        trunk = self.trunks[i]
        final = None if point.guide is None else finite_or_inf(final_of(point))
        reading = trunk.readings[rung] = Reading(score_of(point), trunk.train_loss(since), final)
        self.emit(Event.RUNG, arm=arm_of(i), probe=i, lr=trunk.lr, step=point.step, rung=rung, score=reading.score,
                  loss=point.loss, averaged_loss=point.averaged_loss, train_loss=reading.train)  # fmt: skip
        if i == baseline_of(self.trunks):
            self.baseline.conclude(at_last=rung >= max(self.plan.first, UNRISEN))

    def give_up(self, i: int, status: str) -> None:
        """Trunk `i` has come to grief ("diverged" or "failed") past the last rung at which it was read."""
        trunk, baseline = self.trunks[i], i == baseline_of(self.trunks)
        rung = next((rung for rung in self.plan.fractions if rung not in trunk.readings), self.plan.fractions[-1])
        trunk.readings[rung] = Reading(math.inf)
        self.turn(i, status)
        if baseline and not self.baseline.known:
            following = baseline_of(self.trunks)
            self.baseline.stand_in(None if following is None else self.trunks[following], self.plan)

    def try_again(self) -> None:
        """Trunks that failed before their first rung start anew, as long as trunks may join."""
        unread = [trunk for trunk in self.trunks if trunk.status == "failed" and not trunk.front(self.plan)]
        last = self.course.decisions[-1].rung if self.course.decisions else 0.0
        if not unread or last >= self.plan.settled:
            return
        forgive(unread)
        self._walk()
        self.decided = min(self.decided, len(self.course.decisions))
        self.sort_out()

    def settle(self) -> None:
        """Draw every conclusion that what is known allows. Raises AutoLRSError where no learning rate is left."""
        self._walk()
        self._announce()
        self.sort_out()
        if not self.course.missing and self.course.winner is None:
            raise none_left(self.trunks)

    def _announce(self) -> None:
        for decision in self.course.decisions[self.decided :]:
            if self.decided == 0:
                self._refuse_ignored_lr(decision.rung)
            leader = self.trunks[decision.leader]
            self.emit(Event.DECISION, step=self.plan.step(decision.rung), rung=decision.rung,
                      score=leader.readings[decision.rung].score, leader=leader.lr, judged=decision.judged,
                      kept=[self.trunks[i].lr for i in sorted(decision.play)])  # fmt: skip
            self.decided += 1

    def _refuse_ignored_lr(self, rung: float) -> None:
        read = [(trunk.lr, trunk.readings[rung]) for trunk in self.trunks if rung in trunk.readings]
        refuse_ignored_lr([(lr, r.score, r.train, self.baseline.moved) for lr, r in read if math.isfinite(r.score)])

    def sort_out(self) -> None:
        """Every trunk's status: in play, waiting for its turn below, or given up."""
        play, winner = self.course.play, self.course.winner
        for i, trunk in enumerate(self.trunks):
            if trunk.broken or trunk.status == "won":
                continue
            if i in play or i in self.course.missing:
                if trunk.status == "dropped":
                    trunk.restart()
                    self._tell(i, "all other learning rates have diverged; it starts again")
                self.turn(i, "open")
            elif trunk.readings and trunk.status != "dropped":
                passed = winner is not None or i > max(play, default=i)
                self.turn(i, "dropped" if passed and trunk.lr not in self.kept else "waiting")

    def turn(self, i: int, status: str) -> None:
        """Change a trunk's status, and say so."""
        trunk = self.trunks[i]
        if trunk.status == status:
            return
        trunk.status = status
        if status in ENDED:
            trunk.points = []
        if status == "waiting":
            trunk.previous = None
        self.emit(Event.TRUNK, arm=arm_of(i), probe=i, lr=trunk.lr, status=status, step=trunk.step)

    def warn_of(self, winner: int, lr_interval: tuple[float, float]) -> None:
        """Say what a person should know of the result before using it."""
        if warning := caveat(winner, len(self.trunks), self.course.decisions[-1].judged, lr_interval):
            self._tell(winner, warning)

    def _tell(self, i: int, message: str) -> None:
        self.emit(Event.WARNING, stage=0, arm=arm_of(i), message=f"LR {self.trunks[i].lr:.3g}: {message}")

    def standing(self) -> list[tuple[float, float | None, int]]:
        """(LR, score at the last rung, steps trained) of those in play, the largest LR first."""
        racing = [trunk for trunk in reversed(self.trunks) if trunk.racing]
        return [(t.lr, t.readings[max(t.readings)].score if t.readings else None, t.front(self.plan)) for t in racing]

    def state_dict(self) -> dict[str, Any]:
        return dict(decided=self.decided, plan=self.plan.state_dict(), **self.baseline.state_dict(),
                    trunks=[trunk.state_dict() for trunk in self.trunks])  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any], emit: Callable[..., None], kept: Sequence[float] = ()) -> Race:
        """Raises ValueError, naming it, for what no race can be."""
        saved = conforming("the state", {name: state.get(name) for name in _SAVED}, _SAVED)
        trunks = [Trunk.from_state(trunk) for trunk in saved["trunks"]]
        require_int("learning rates", len(trunks), 1, 2 * MANY)
        decided = require_int("decided", saved["decided"], 0)
        return cls(RacePlan.from_state(state["plan"]), trunks, emit, kept, Baseline.from_state(state), decided)


_SAVED: dict[str, Any] = dict(decided=int, trunks=list[Any])
