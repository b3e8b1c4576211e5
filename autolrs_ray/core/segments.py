"""Segments: the stretches of training that a policy asks for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from autolrs_ray.core.envelopes import EnvelopeSpec, lr_factor
from autolrs_ray.core.growth import BatchGrowth


@dataclass(frozen=True)
class Segment:
    """A stretch of training: restore `source` (None: begin from scratch), train from `start` to the last boundary.

    lr: learning rate, multiplied by the envelope at every step. boundaries: steps at which a report must fall (the ends
    of stages, or rungs). reports: how many reports are wanted up to each boundary, one number for all or one for each.
    warmup_steps: if positive, a linear rise over the first `warmup_steps` steps of the run is a further factor.
    growth: (step, factor) pairs: from that step on every step takes so many batches (:class:`BatchGrowth`).
    """

    arm: str
    role: str  # "probe", "main" or "trunk"
    stage: int
    lr: float
    start: int
    boundaries: tuple[int, ...]
    reports: int | tuple[int, ...]
    source: str | None = None
    envelope: EnvelopeSpec = None
    total_steps: int = 0
    warmup_steps: int = 0
    growth: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        return self.boundaries[-1]

    def to_config(self) -> dict[str, Any]:
        """The segment as the value of `config["autolrs"]` (without its source: restoring is Tune's part)."""
        return {key: value for key, value in vars(self).items() if key != "source"}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Segment:
        reports = config["reports"]
        reports = reports if isinstance(reports, int) else tuple(reports)
        growth = BatchGrowth.from_config(config.get("growth", ())).points
        return cls(**{**config, "boundaries": tuple(config["boundaries"]), "reports": reports, "growth": growth})

    def lr_at(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`."""
        return self.lr * lr_factor(self.envelope, step, self.total_steps, self.warmup_steps)

    def batches_at(self, step: int) -> int:
        """Batches that the update from `step` to `step + 1` takes: 1, unless the batch grows."""
        return BatchGrowth(self.growth).factor(step)


def next_report(segment: Segment, step: int) -> int:
    """First step after `step` at which `segment` wants a report: evenly spaced ones up to every boundary."""
    marks = [segment.start, *segment.boundaries]
    for i, (low, high) in enumerate(pairwise(marks)):
        if step < high:
            wanted = segment.reports if isinstance(segment.reports, int) else segment.reports[i]
            count = min(wanted, high - low)
            return next(mark for j in range(1, count + 1) if (mark := low + (high - low) * j // count) > step)
    return step + 1
