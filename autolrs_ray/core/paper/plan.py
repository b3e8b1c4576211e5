"""How the paper's policy cuts a run into stages: frozen, validated values. Units are optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autolrs_ray.core.checks import require_float, require_int

MOST_STAGES = 100_000
"""Each has its search: a run of more is a slip of units."""


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
        if self.total_steps > MOST_STAGES * self.max_stage_steps:
            raise ValueError(
                f"{self.total_steps} steps in stages of {self.max_stage_steps} are more than {MOST_STAGES} stages: are all "
                "given in optimizer steps?"
            )
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

    def ranks_by_training(self, index: int) -> bool:
        """True up to the first stage of tau_max steps: so far the authors' code ranks by training loss, after it by validation
        loss."""
        return index == 0 or self.stage_steps << min(index - 1, 62) < self.max_stage_steps

    def stages(self) -> list[Stage]:
        """All stages of the run, in order."""
        result: list[Stage] = []
        start = self.warmup_steps
        while start < self.total_steps:
            result.append(self.stage(len(result), start))
            start = result[-1].end
        return result
