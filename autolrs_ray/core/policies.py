"""Policies by name, from keyword options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autolrs_ray.core.checks import require_int, require_one_of, validate_interval
from autolrs_ray.core.envelopes import envelope_factor
from autolrs_ray.core.growth import require_growth
from autolrs_ray.core.paper.plan import StagePlan
from autolrs_ray.core.paper.policy import PaperPolicy
from autolrs_ray.core.policy import Policy
from autolrs_ray.core.race.policy import AnchoredPolicy

LEAST_RATIO = 1.01
"""Of the ends of an interval: learning rates that differ by less give the same losses."""

DEFAULT_INTERVALS = {"paper": (1e-3, 1e-1), "anchored": (1e-5, 10.0)}

_COMMON_OPTIONS = ("batch_growth",)
_PLAN_OPTIONS = ("stage_steps", "max_stage_steps", "probe_steps", "warmup_steps", "warmup_lr")
_PAPER_OPTIONS = ("num_lrs", "kappa", "initial", "fit", "series", "probe_reports", "main_reports", "promote",
                  "envelope", "floor", "points_to_evaluate")  # fmt: skip
_RACE_OPTIONS = ("num_lrs", "envelope", "warmup", "commits", "run_ahead", "points_to_evaluate", "keep")


def _paper(total_steps: int, options: dict[str, Any], **common: Any) -> Policy:
    stage_steps = options.pop("stage_steps", None)
    if stage_steps is None:
        raise ValueError('policy="paper" needs stage_steps (tau, the optimizer steps of the first stage)')
    require_int("stage_steps", stage_steps, 1)
    max_stage_steps, probe_steps = options.pop("max_stage_steps", None), options.pop("probe_steps", None)
    plan = StagePlan(
        total_steps=total_steps,
        stage_steps=stage_steps,
        max_stage_steps=8 * stage_steps if max_stage_steps is None else max_stage_steps,
        probe_steps=max(1, stage_steps // 10) if probe_steps is None else probe_steps,
        warmup_steps=options.pop("warmup_steps", 0),
        warmup_lr=options.pop("warmup_lr", 0.0),
    )
    return PaperPolicy(total_steps, plan=plan, **common, **options)


def _anchored(total_steps: int, options: dict[str, Any], **common: Any) -> Policy:
    return AnchoredPolicy(total_steps, **common, **options)


_POLICIES: dict[str, tuple[Callable[..., Policy], tuple[str, ...]]] = {
    "paper": (_paper, _PLAN_OPTIONS + _PAPER_OPTIONS + _COMMON_OPTIONS),
    "anchored": (_anchored, _RACE_OPTIONS + _COMMON_OPTIONS),
}


def make_policy(
    name: str,
    total_steps: int,
    lr_interval: tuple[float, float] | str | None = None,
    seed: int = 0,
    concurrency: int = 1,
    **options: Any,
) -> Policy:
    """The policy `name` ("paper" or "anchored") for `total_steps` optimizer steps.

    Raises ValueError or TypeError, naming the value, for anything out of range or an option the policy does not have.
    """
    require_one_of("policy", name, _POLICIES)
    require_int("total_steps", total_steps, 2)
    require_int("seed", seed, 0)
    build, allowed = _POLICIES[name]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f'policy="{name}" has no option {", ".join(unknown)}; it has {", ".join(sorted(allowed))}')
    interval = validate_interval(DEFAULT_INTERVALS[name] if lr_interval is None else lr_interval)
    if interval[1] < LEAST_RATIO * interval[0]:
        raise ValueError(f"lr_interval must span a factor of {LEAST_RATIO} at least, got {interval}: widen it")
    growth = require_growth(options.pop("batch_growth", None))
    _refuse_zero(options.get("envelope"), total_steps)
    return build(total_steps, options, lr_interval=interval, seed=seed, concurrency=concurrency, batch_growth=growth)


def _refuse_zero(envelope: Any, total_steps: int) -> None:
    """Raise ValueError for a function that is 0 at every step, or at a thousand of them."""
    steps = range(0, total_steps, max(1, total_steps // 1000))
    if callable(envelope) and not any(envelope_factor(envelope, step, total_steps) for step in steps):
        raise ValueError("the envelope is 0 at every step, and would train nothing: it must give a factor above 0")


def options_of(policy: Policy) -> dict[str, Any]:
    """All options of `make_policy` that decide the course of `policy`, as they were resolved: JSON values, functions named."""
    if isinstance(policy, PaperPolicy):
        found = {name: getattr(policy.plan, name) for name in _PLAN_OPTIONS}
        found |= {name: getattr(policy, name) for name in _PAPER_OPTIONS}
    else:
        found = {name: getattr(policy, name) for name in _RACE_OPTIONS}
    found["batch_growth"] = [list(pair) for pair in policy.batch_growth.items()] or None
    return {name: described(value, policy.total_steps) for name, value in found.items()}


def rule_of(policy: Policy) -> dict[str, Any] | None:
    """What else decides it, which is no option: the rungs and numbers of the race's rule. None where there is nothing."""
    return policy.plan.state_dict() if isinstance(policy, AnchoredPolicy) else None


def described(value: Any, total_steps: int) -> Any:
    """An option as a JSON value: a function of steps by its name, and by what it gives at every tenth of a run's steps."""
    if not callable(value):
        return value
    factors = (envelope_factor(value, i * (total_steps - 1) // 10, total_steps) for i in range(11))
    return f"function {getattr(value, '__name__', '')}: {', '.join(f'{factor:.4g}' for factor in factors)}"


def is_same_option(then: Any, now: Any) -> bool:
    """Whether an option as it was described is as it is described now; a function may have been by its name alone."""
    return bool(then == now) or (
        isinstance(now, str) and now.startswith("function ") and now.partition(": ")[0] == then
    )
