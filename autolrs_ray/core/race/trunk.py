"""A trunk of the race: one learning rate, how far it has come, and what has been read of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from autolrs_ray.core.race.rule import Reading

ENDED = ("dropped", "diverged", "failed")
"""A trunk that is "dropped" has been given up by the rule; the others have come to grief."""


@dataclass(eq=False)
class Trunk:
    """One LR scale of the race. status: "untried", "open" (in play), "waiting", one of ENDED, or "won".

    step, checkpoint: the last commit; previous: the one before it; held: the one at the end of the envelope's hold.
    saved_loss: the score at the last commit. readings: by rung, a nominal share of the run. since: (step, training loss) of the
    reports up to the last commit, from the one on at which the last rung before it was passed.
    """

    lr: float
    status: str = "untried"
    step: int = 0
    checkpoint: str | None = None
    previous: tuple[int, str] | None = None
    held: tuple[int, str] | None = None
    saved_loss: float | None = None
    readings: dict[float, Reading] = field(default_factory=dict)
    since: list[tuple[int, float | None]] = field(default_factory=list)

    @property
    def active(self) -> bool:
        """Whether it is in play or may come to be."""
        return self.status in ("untried", "open", "waiting")

    @property
    def broken(self) -> bool:
        return self.status in ("diverged", "failed")

    def restart(self) -> None:
        """From scratch; what has been read of it stays."""
        self.step, self.since = 0, []
        self.checkpoint = self.previous = self.held = self.saved_loss = None

    def state_dict(self) -> dict[str, Any]:
        readings = [[rung, _json(r.score), _json(r.train), _json(r.final)] for rung, r in self.readings.items()]
        return {**vars(self), "readings": readings, "since": list(self.since)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trunk:
        pairs = {name: tuple(state[name]) if state[name] else None for name in ("previous", "held")}
        readings = {rung: Reading(float(s), _number(t), _number(final)) for rung, s, t, final in state["readings"]}
        return cls(**{**state, **pairs, "readings": readings, "since": [(s, t) for s, t in state["since"]]})


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _json(number: float | None) -> float | str | None:
    """JSON has no infinity; float() reads the word."""
    return number if number is None or math.isfinite(number) else "inf"
