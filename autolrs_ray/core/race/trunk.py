"""A trunk of the race: one learning rate, how far it has come, and what has been read of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from autolrs_ray.core.checks import conforming, require_one_of
from autolrs_ray.core.policy import Point
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.readings import final_of
from autolrs_ray.core.race.rule import Reading

ENDED = ("dropped", "diverged", "failed")
"""A trunk that is "dropped" has been given up by the rule; the others have come to grief."""

STATUSES = ("untried", "open", "waiting", *ENDED, "won")


@dataclass(eq=False)
class Trunk:
    """One LR scale of the race. status: one of STATUSES; "open" is in play.

    step, checkpoint: the last commit; previous: the one before it; held: the one at the end of the envelope's hold.
    saved_loss: the score at the last commit. readings: by rung, a nominal share of the run. points: the reports since the last
    rung before the last commit; of those up to that commit step and training loss are durable.
    """

    lr: float
    status: str = "untried"
    step: int = 0
    checkpoint: str | None = None
    previous: tuple[int, str] | None = None
    held: tuple[int, str] | None = None
    saved_loss: float | None = None
    readings: dict[float, Reading] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    @property
    def active(self) -> bool:
        """Whether it is in play or may come to be."""
        return self.status in ("untried", "open", "waiting")

    @property
    def racing(self) -> bool:
        """Whether it is trained to the next rung, or has won."""
        return self.status in ("open", "won")

    @property
    def broken(self) -> bool:
        return self.status in ("diverged", "failed")

    @property
    def paths(self) -> set[str]:
        """Its checkpoints."""
        pairs = [pair for pair in (self.previous, self.held) if pair]
        return {path for _, path in pairs} | ({self.checkpoint} if self.checkpoint else set())

    def front(self, plan: RacePlan) -> int:
        """How far it has come: its last commit, or the last rung at which it was read."""
        passed = (plan.step(rung) for rung, reading in self.readings.items() if math.isfinite(reading.score))
        return max(self.step, *passed, 0)

    def restart(self) -> None:
        """From scratch; what has been read of it stays."""
        self.step, self.points = 0, []
        self.checkpoint = self.previous = self.held = self.saved_loss = None

    def hear(self, point: Point) -> int:
        """Take a report in; return the step that had been passed before it."""
        if point.step <= self.step:  # it comes late, and what led to the commit stands
            return self.step
        while self.points and self.points[-1].step >= point.step:  # the trial was restarted and goes over old ground
            self.points.pop()
        before = max(self.step, self.points[-1].step if self.points else 0)
        self.points.append(point)
        return before

    def train_loss(self, since: int) -> float | None:
        """Mean training loss per step, up to the last report, from the report on at which the step `since` was passed."""
        start = next((n for n, point in enumerate(self.points) if point.step >= since > 0), None)
        points = [Point(self.step, 0.0), *self.points] if start is None else self.points[start:]
        losses = [(later.step - earlier.step, later.train_loss) for earlier, later in pairwise(points)]
        losses = losses or [(1, self.points[-1].train_loss)]
        known = [(steps, loss) for steps, loss in losses if loss is not None and steps > 0]
        return sum(steps * loss for steps, loss in known) / sum(steps for steps, _ in known) if known else None

    def commit(self, step: int, path: str, rung: int) -> Point | None:
        """There is a checkpoint at `step`; the last rung up to there lies at step `rung`. The report at `step`, if known."""
        if self.checkpoint is not None and self.status != "waiting":
            self.previous = (self.step, self.checkpoint)
        self.step, self.checkpoint = step, path
        point = next((point for point in self.points if point.step == step and math.isfinite(point.loss)), None)
        self.saved_loss = final_of(point) if point else None
        start = next((n for n, earlier in enumerate(self.points) if earlier.step >= rung > 0), 0)
        self.points = self.points[start:]
        return point

    def lose(self, path: str) -> bool:
        """The checkpoint at `path` cannot be read. True if that was the last, and the trunk has gone back to the one before."""
        self.previous, self.held = (pair if pair and pair[1] != path else None for pair in (self.previous, self.held))
        if self.checkpoint != path or not (self.active or self.status == "won"):
            return False
        self.step, self.checkpoint = self.previous or (0, None)
        self.previous, self.points = None, []
        return True

    def state_dict(self) -> dict[str, Any]:
        since = [(point.step, point.train_loss) for point in self.points if point.step <= self.step]
        durable = {name: value for name, value in vars(self).items() if name != "points"}
        readings = [[rung, _json(r.score), _json(r.train), _json(r.final)] for rung, r in self.readings.items()]
        return {**durable, "readings": readings, "since": since}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trunk:
        """Raises ValueError, naming it, for what no trunk can be."""
        saved = conforming("trunk", state, _SAVED)
        require_one_of("status", saved["status"], STATUSES)
        points = [Point(step, math.nan, train) for step, train in saved.pop("since")]
        readings = {rung: Reading(*map(_number, read)) for rung, *read in saved.pop("readings")}  # type: ignore[arg-type]
        return cls(**saved, readings=readings, points=points)


_SAVED: dict[str, Any] = dict(
    lr=float, status=str, step=int, checkpoint=str | None, previous=tuple[int, str] | None, held=tuple[int, str] | None,
    saved_loss=float | None, since=list[tuple[int, float | None]],
    readings=list[tuple[float, float | str, float | str | None, float | str | None]],
)  # fmt: skip


def _number(value: float | str | None) -> float | None:
    if isinstance(value, str) and value != "inf":
        raise ValueError(f"a reading cannot be {value[:60]!r}")
    return None if value is None else float(value)


def _json(number: float | None) -> float | str | None:
    """JSON has no infinity; float() reads the word."""
    return number if number is None or math.isfinite(number) else "inf"
