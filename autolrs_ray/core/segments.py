"""Segments: the stretches of training that a policy asks for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from autolrs_ray.core.plan import EnvelopeSpec, lr_factor


@dataclass(frozen=True)
class Segment:
    """A stretch of training: restore `source` (None: begin from scratch), train from `start` to the last boundary.

    lr: learning rate, multiplied by the envelope at every step. boundaries: steps at which a report must fall (the ends
    of stages, or rungs). reports: how many reports are wanted up to each boundary. warmup_steps: if positive, a linear
    rise over the first `warmup_steps` steps of the run is a further factor. sparse_from: from this step on, one report per
    boundary is enough (None: `reports` everywhere).
    """

    arm: str
    role: str  # "probe", "main" or "trunk"
    stage: int
    lr: float
    start: int
    boundaries: tuple[int, ...]
    reports: int
    source: str | None = None
    envelope: EnvelopeSpec = None
    total_steps: int = 0
    warmup_steps: int = 0
    sparse_from: int | None = None

    @property
    def end(self) -> int:
        return self.boundaries[-1]

    def to_config(self) -> dict[str, Any]:
        """The segment as the value of `config["autolrs"]` (without its source: restoring is Tune's part)."""
        return {key: value for key, value in vars(self).items() if key != "source"}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Segment:
        return cls(**{**config, "boundaries": tuple(config["boundaries"])})

    def lr_at(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`."""
        return self.lr * lr_factor(self.envelope, step, self.total_steps, self.warmup_steps)


def next_report(segment: Segment, step: int) -> int:
    """First step after `step` at which `segment` wants a report: evenly spaced ones up to every boundary."""
    marks = [segment.start, *segment.boundaries]
    for low, high in pairwise(marks):
        if step < high:
            sparse = segment.sparse_from is not None and low >= segment.sparse_from
            count = min(1 if sparse else segment.reports, high - low)
            return next(mark for i in range(1, count + 1) if (mark := low + (high - low) * i // count) > step)
    return step + 1
