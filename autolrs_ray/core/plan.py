"""Stage plans, decay envelopes and rungs: frozen, validated values. Units are optimizer steps unless said otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require_int(name: str, value: Any, minimum: int) -> int:
    """Return `value` if it is an int >= `minimum`; raise TypeError or ValueError that names it otherwise."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def require_float(name: str, value: Any, low: float, high: float, low_open: bool = False) -> float:
    """Return `value` as float if it is a finite real number in [low, high] (or (low, high] if `low_open`)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not math.isfinite(number) or number > high or number < low or (low_open and number == low):
        raise ValueError(f"{name} must be a finite number in {'(' if low_open else '['}{low}, {high}], got {value!r}")
    return number


def require_bool(name: str, value: Any) -> bool:
    """Return `value` if it is True or False; raise TypeError that names it otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def require_one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of the names `allowed`; raise ValueError that names it, whatever it is, otherwise."""
    names = sorted(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value


def require_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Return `value` as a tuple if it is a list or tuple; raise TypeError that names it otherwise."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple, got {value!r} ({type(value).__name__})")
    return tuple(value)


def validate_interval(lr_interval: Any) -> tuple[float, float]:
    """Return (min_lr, max_lr) with 0 < min_lr < max_lr, both finite; raise with the value otherwise."""
    try:
        low, high = lr_interval
    except (TypeError, ValueError):
        raise TypeError(f"lr_interval must be a pair (min_lr, max_lr), got {lr_interval!r}") from None
    low = require_float("min_lr", low, 0.0, math.inf, low_open=True)
    high = require_float("max_lr", high, 0.0, math.inf, low_open=True)
    if not low < high:
        raise ValueError(f"min_lr must be below max_lr, got {low=}, {high=}; widen lr_interval")
    return low, high


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


@dataclass(frozen=True)
class Stage:
    """One stage of the paper's Algorithm 1: `steps` is its tau, `probe_steps` its tau'."""

    index: int
    start: int
    steps: int
    probe_steps: int

    @property
    def end(self) -> int:
        return self.start + self.steps


@dataclass(frozen=True)
class StagePlan:
    """How a run of `total_steps` is cut into stages (paper, section 4.1).

    stage_steps: tau of the first stage; it doubles from stage to stage up to `max_stage_steps` (tau_max).
    probe_steps: tau' of the first stage (default tau / 10); it doubles with tau.
    warmup_steps: steps of linear warm-up to `warmup_lr` before the first stage; they are not searched.
    """

    total_steps: int
    stage_steps: int
    max_stage_steps: int
    probe_steps: int
    warmup_steps: int = 0
    warmup_lr: float = 0.0

    def __post_init__(self) -> None:
        require_int("total_steps", self.total_steps, 1)
        require_int("stage_steps", self.stage_steps, 1)
        require_int("max_stage_steps", self.max_stage_steps, 1)
        require_int("probe_steps", self.probe_steps, 1)
        require_int("warmup_steps", self.warmup_steps, 0)
        if self.stage_steps > self.max_stage_steps:
            raise ValueError(
                f"max_stage_steps must be at least stage_steps, got {self.max_stage_steps=}, {self.stage_steps=}"
            )
        if self.probe_steps > self.stage_steps:
            raise ValueError(f"probe_steps must be at most stage_steps, got {self.probe_steps=}, {self.stage_steps=}")
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps must be below total_steps, got {self.warmup_steps=}, {self.total_steps=}")
        if self.warmup_steps:
            require_float("warmup_lr", self.warmup_lr, 0.0, math.inf, low_open=True)

    def stage(self, index: int, start: int) -> Stage:
        """Stage `index`, beginning at step `start`; the last stage is cut at `total_steps`."""
        ratio = self.probe_steps / self.stage_steps
        tau = min(self.stage_steps * 2 ** min(index, 62), self.max_stage_steps)
        steps = min(tau, self.total_steps - start)
        return Stage(index, start, steps, max(1, min(steps, round(tau * ratio))))

    def is_full_length(self, index: int) -> bool:
        """True where tau has reached tau_max: from there on the authors' code ranks by validation loss."""
        return self.stage_steps << min(index, 62) >= self.max_stage_steps

    def stages(self) -> list[Stage]:
        """All stages of the run, in order."""
        result: list[Stage] = []
        start = self.warmup_steps
        while start < self.total_steps:
            result.append(self.stage(len(result), start))
            start = result[-1].end
        return result


RUNGS: tuple[float, ...] = (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.75)
"""Fractions of the total steps at which the race compares its trunks."""

TOLERANCES: tuple[float, ...] = (0.01,) * 5 + (0.005,) * 5
"""How much worse than the leader (relative score) an LR may be at each rung and still go on, whichever it is."""

THRIFTY_RUNGS: tuple[float, ...] = (0.01, *RUNGS)
THRIFTY_TOLERANCES: tuple[float, ...] = (0.005,) * len(THRIFTY_RUNGS)


@dataclass(frozen=True)
class RacePlan:
    """Rungs of the opening race, in steps, with the tolerance at each. The last step of the run is no rung."""

    total_steps: int
    rungs: tuple[int, ...]
    tolerances: tuple[float, ...]

    @classmethod
    def from_fractions(
        cls, total_steps: int, fractions: tuple[float, ...] = RUNGS, tolerances: tuple[float, ...] = TOLERANCES
    ) -> RacePlan:
        """Rungs at `fractions` of `total_steps`; fractions that fall on the same step are merged (the later wins)."""
        require_int("total_steps", total_steps, 2)
        if len(fractions) != len(tolerances) or not fractions:
            raise ValueError(f"rungs and tolerances must have the same length >= 1, got {fractions}, {tolerances}")
        for fraction in fractions:
            require_float("each rung", fraction, 0.0, 1.0, low_open=True)
        for tolerance in tolerances:
            require_float("each tolerance", tolerance, 0.0, math.inf)
        if list(fractions) != sorted(set(fractions)):
            raise ValueError(f"rungs must be increasing fractions of the run, got {fractions}")
        merged: dict[int, float] = {}
        for fraction, tolerance in zip(fractions, tolerances, strict=True):
            merged[max(1, round(fraction * total_steps))] = tolerance
        steps = tuple(step for step in sorted(merged) if step < total_steps)
        return cls(total_steps, steps, tuple(merged[step] for step in steps))
