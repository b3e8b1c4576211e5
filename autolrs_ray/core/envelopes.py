"""Decay envelopes, the rise, and learning rates on a log scale. Steps are optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Envelope = Callable[[int], float]
"""Step -> factor that multiplies the learning rate."""

EnvelopeSpec = str | Envelope | None
"""A name from :data:`ENVELOPES`, a function step -> factor, or None for a constant LR."""


def _quadratic(u: float) -> float:
    return 1.0 - u * u


def _linear(u: float) -> float:
    return 1.0 - u


def _cosine(u: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * u))


def _wsd(u: float) -> float:
    return 1.0 if u <= 0.4 else (1.0 - u) / 0.6


def _constant(u: float) -> float:
    return 1.0


ENVELOPES: dict[str, Callable[[float], float]] = {
    "quadratic": _quadratic,
    "wsd": _wsd,
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}
"""Named envelopes as functions of u = step / total_steps in [0, 1]; each starts at 1 and all but "constant" end at 0."""


def envelope_factor(spec: EnvelopeSpec, step: int, total_steps: int) -> float:
    """Factor of the envelope at `step` (the LR of the update from `step` to `step + 1`).

    Raises ValueError for an unknown name or a factor that is negative or not finite.
    """
    if spec is None:
        return 1.0
    if callable(spec):
        factor = float(spec(step))
    elif isinstance(spec, str) and spec in ENVELOPES:
        factor = ENVELOPES[spec](min(1.0, max(0.0, step / total_steps)))
    else:
        raise ValueError(f"unknown envelope {spec!r}: use one of {sorted(ENVELOPES)}, or a function step -> factor")
    if not math.isfinite(factor) or factor < 0.0:
        raise ValueError(f"the envelope must be finite and >= 0 at every step, got {factor} at {step=}")
    return factor


def lr_factor(envelope: EnvelopeSpec, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """What a scale is multiplied by at `step`: the envelope's factor and, over the first `warmup_steps`, a linear rise."""
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rise * envelope_factor(envelope, step, total_steps)


@dataclass(frozen=True)
class LogInterval:
    """Learning rates from `low` to `high` on a scale x that is even in log LR: 0 at `low`, 1 at `high`."""

    low: float
    high: float

    def lr(self, x: float) -> float:
        """The learning rate at `x`."""
        return math.exp(math.log(self.low) + x * (math.log(self.high) - math.log(self.low)))

    def x(self, lr: float) -> float:
        """Where `lr` lies; outside [0, 1] where it is outside the interval."""
        return (math.log(lr) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))


def bin_centred_grid(count: int) -> list[float]:
    """`count` points of [0, 1] in the middle of as many equal bins."""
    return [(i + 0.5) / count for i in range(count)]
