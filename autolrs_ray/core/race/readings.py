"""What reports say at a rung, and what an untrained model's say: scores, and how far they scatter."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from autolrs_ray.core.policy import Point, finite_or_inf
from autolrs_ray.core.race.plan import FIRST_READINGS
from autolrs_ray.core.race.rule import Untrained

STUDENT = 3.18
"""Student's t of FIRST_READINGS: 95 % lie within so many standard deviations of their mean."""


def final_of(point: Point) -> float:
    """Of the raw or the averaged weights, whichever are better: one of them is the final model."""
    return _better(point.loss, point.averaged_loss)


def score_of(point: Point) -> float:
    """What rungs are judged by: the same, of the validation loss where the metric is another."""
    return final_of(point) if point.guide is None else _better(point.guide, point.averaged_guide)


def guide_of(point: Point) -> float:
    """The same of the raw weights."""
    return point.loss if point.guide is None else point.guide


def _better(raw: float, averaged: float | None) -> float:
    return raw if averaged is None else min(raw, averaged, key=finite_or_inf)


def untrained_by(points: list[Point]) -> Untrained:
    """What an untrained model reads, by the first reports of the smallest LR: the first score of raw weights, the mean of
    training losses.

    Noise is how far off the next would be in 95 of 100 cases (Student's t): of training losses by means over FIRST_READINGS
    parts, since they are means themselves, of scores as they are. Of fewer readings it is not known, and counts as none. The
    validation data are taken to scatter as batches do. Readings are rough without training losses or averages.
    """
    scores = [score for score in map(score_of, points) if math.isfinite(score)]
    raw = next(filter(math.isfinite, map(guide_of, points)), max(scores, default=math.inf))
    rough = any(point.train_loss is None or point.averaged_loss is None for point in points)
    parts: dict[int, list[tuple[int, float]]] = {}
    for before, point in zip([0, *(point.step for point in points)], points, strict=False):
        if point.train_loss is not None and math.isfinite(point.train_loss):
            middle = (before + point.step) / 2.0
            part = int(FIRST_READINGS * middle / points[-1].step)
            parts.setdefault(part, []).append((point.step - before, point.train_loss))
    means = [sum(steps * loss for steps, loss in part) / sum(steps for steps, _ in part) for part in parts.values()]
    noise, val_batches = _scatter(means), next((point.val_batches for point in points if point.val_batches), None)
    sampling = None
    if val_batches and noise > 0.0:
        sampling = noise * math.sqrt(points[-1].step / FIRST_READINGS / val_batches)
    return Untrained(raw, fmean(means) if means else None, noise, _scatter(scores), rough, sampling)


def _scatter(values: list[float]) -> float:
    """Half the width of the interval in which the next of such `values` lies in 95 of 100 cases."""
    count = len(values)
    return STUDENT * stdev(values) * math.sqrt(1 + 1 / count) if count >= FIRST_READINGS else 0.0
