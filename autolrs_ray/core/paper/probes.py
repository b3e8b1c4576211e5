"""What the reports of a stage's probes come to: their series, the best of them, and when training has diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_high

from autolrs_ray.core.paper.forecast import Forecast, forecast
from autolrs_ray.core.paper.proposals import Probe
from autolrs_ray.core.policy import Point

WALL = 4.0  # times the height above the floor that training began from: above it, it has diverged


def series_of(points: list[Point], start: int, by_training: bool) -> tuple[str, list[int], list[float]]:
    """What a probe that reported `points` since step `start` is ranked by: "training" or "validation", and the series of that
    loss, at steps of the stage. by_training: by the training loss, where every report has one.
    """
    steps = [point.step - start for point in points]
    training = [point.train_loss for point in points if point.train_loss is not None]
    if by_training and len(training) == len(points):
        return "training", steps, training
    return "validation", steps, [point.loss for point in points]


def first_report(probes: Sequence[Probe], series: str) -> float | None:
    """Where a stage began, as far as its own probes tell: the lower quartile of their first losses of `series`.

    A probe that explodes before its first report must not pass for one that began high and has come a long way; up to three
    quarters of them may. To take it a little too low costs credit for the steps to come, no more.
    """
    first = [p.losses[0] for p in probes if p.losses and p.series == series]
    if series == "validation":
        first = [p.first_loss for p in probes if p.losses and p.first_loss is not None]
    return sorted(first)[len(first) // 4] if first else None


@dataclass(frozen=True)
class Start:
    """Where a stage began: validation loss and mean training loss there, and the first validation loss of the run. None where
    nobody has measured it."""

    loss: float | None
    train_loss: float | None
    first_loss: float | None


def judge(probe: Probe, probes: Sequence[Probe], start: Start, horizon: int, floor: float | None) -> Forecast:
    """The forecast of a probe that has come to its end with finite losses: "diverged" if that lies above the wall.

    probes: all of the stage that have ended; they tell where it began if `start` does not, and what can be gained.
    """
    loss = first_report(probes, "validation") if start.loss is None else start.loss
    train_loss = first_report(probes, "training") if start.train_loss is None else start.train_loss
    own = probe.first_loss if start.loss is None else None  # others' first reports may lie far below the start already
    starts = (loss, own, start.first_loss)
    if probe.loss is not None and probe.loss > divergence_wall(starts, [p.loss for p in [*probes, probe]], floor):
        return Forecast(math.inf, math.inf, "diverged")
    began = train_loss if probe.series == "training" else loss
    return forecast(probe.steps, probe.losses, horizon, floor, began)


def best_of(probes: Sequence[Probe]) -> int | None:
    """Index of the probe with the lowest forecast; None if none has one."""
    done = [(p.forecast, i) for i, p in enumerate(probes) if p.status == "done" and p.forecast is not None]
    return min(done)[1] if done else None


def next_smaller(probes: Sequence[Probe], chosen: int) -> int | None:
    """Index of the lowest forecast among LRs of half the chosen one's at most, or among all below it if there are none."""
    lr, done = probes[chosen].lr, [probe for probe in probes if probe.status == "done"]
    below = _half(probes, chosen) or [probe for probe in done if probe.lr < lr]
    best = best_of(below)
    return None if best is None else next(i for i, probe in enumerate(probes) if probe is below[best])


def half_is_left(probes: Sequence[Probe], chosen: int) -> bool:
    """Whether an LR of half the chosen one's at most has been tried, and did not diverge."""
    return bool(_half(probes, chosen))


def _half(probes: Sequence[Probe], chosen: int) -> list[Probe]:
    return [probe for probe in probes if probe.status == "done" and probe.lr <= probes[chosen].lr / 2.0]


def opening_loss(probes: Sequence[Probe], best: int) -> float | None:
    """The loss that `probes` began from, as far as it was measured; None if none had a finite one.

    The median of their first losses, which a few LRs that blow up at once leave as it is, or that of the `best` probe, where
    that is larger: the main trial goes its way.
    """
    first = [probe.first_loss for probe in probes if probe.first_loss is not None]
    own = probes[best].first_loss
    return max(median_high(first), own) if own is not None else None


def divergence_wall(starts: Iterable[float | None], seen: Iterable[float | None], floor: float | None) -> float:
    """The loss above which training has diverged. starts: losses that it began from, as far as they are known; `seen`: others
    that the run has come to.

    WALL times the largest of the starts, above the floor. (One start near 0 is no yardstick: every harmless rise is many times
    as much.) Where the loss has no floor, or has come to lie below it, the larger of two stands for the height: the size of
    that loss, and what the run has gained at most. Infinite where there is nothing to measure by.
    """
    known = [value for value in starts if value is not None]
    if not known:
        return math.inf
    start = max(known)
    low = min([*known, *(value for value in seen if value is not None)])
    height = max(start - low, abs(start)) if floor is None or low < floor else start - floor
    return start + (WALL - 1.0) * height if height > 0.0 else math.inf


def has_blown_up(point: Point, starts: Iterable[float | None], probes: Sequence[Probe], floor: float | None) -> bool:
    """Whether training that ends so is above the wall, by the training loss too, where there is one: batch norm's running
    statistics can make a validation loss huge after a few steps at a high LR, and the model is well. probes: the stage's."""
    loss = point.loss if point.train_loss is None else min(point.loss, point.train_loss)
    return loss > divergence_wall(starts, [probe.loss for probe in probes], floor)
