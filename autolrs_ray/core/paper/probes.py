"""What the reports of a stage's probes come to: a forecast for each, the best of them, and when training has diverged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high

from autolrs_ray.core.paper.forecast import Forecast, forecast
from autolrs_ray.core.paper.proposals import Probe
from autolrs_ray.core.policy import Point

WALL = 4.0  # times the loss that training began from: above it, it has diverged


@dataclass(frozen=True)
class Outcome:
    """A probe's forecast, and the losses it was made from: `series` ("training" or "validation") at `steps` of the stage."""

    predicted: Forecast
    series: str
    steps: list[int]
    losses: list[float]


def outcome_of(points: list[Point], start: int, horizon: int, by_training: bool, floor: float | None) -> Outcome:
    """The loss that `points`, reported since step `start`, forecast for `horizon` steps after it.

    by_training: by the training loss, where every report has one. floor: lower bound of the loss, None where it has none.
    """
    training = [point.train_loss for point in points if point.train_loss is not None]
    usable = by_training and len(training) == len(points)
    steps = [point.step - start for point in points]
    losses = training if usable else [point.loss for point in points]
    return Outcome(forecast(steps, losses, horizon, floor), "training" if usable else "validation", steps, losses)


def best_of(probes: Sequence[Probe]) -> int | None:
    """Index of the probe with the lowest forecast; None if none has one."""
    done = [(p.forecast, i) for i, p in enumerate(probes) if p.status == "done" and p.forecast is not None]
    return min(done)[1] if done else None


def opening_loss(probes: Sequence[Probe], best: int) -> float | None:
    """The loss that `probes` began from, as far as it was measured; None if none had a finite one.

    The median of their first losses, which a few LRs that blow up at once leave as it is, or that of the `best` probe, where
    that is larger: the main trial goes its way.
    """
    first = [probe.first_loss for probe in probes if probe.first_loss is not None]
    own = probes[best].first_loss
    return max(median_high(first), own) if own is not None else None


def divergence_wall(loss: float | None, first_loss: float | None, floor: float | None) -> float:
    """The loss above which training has diverged: WALL times the larger of `loss`, that it started from, and `first_loss`,
    the first that the run has measured. A start near 0 is no yardstick: every harmless rise is many times as much.

    Infinite where there is no positive loss to measure by, or no `floor`: a metric without one has no scale.
    """
    yardstick = max((value for value in (loss, first_loss) if value is not None), default=0.0)
    return WALL * yardstick if yardstick > 0 and floor is not None else math.inf
