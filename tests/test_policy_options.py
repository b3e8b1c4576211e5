"""make_policy: a bad value is refused by its name."""

from __future__ import annotations

import math

import pytest

from autolrs_ray.core.policies import make_policy
from tests.papers import OPTIONS

BAD = [
    (dict(total_steps=0), ValueError, "total_steps must be at least 2, got 0"),
    (dict(total_steps=100.0), TypeError, "total_steps must be an int, got 100.0"),
    (dict(total_steps=True), TypeError, "total_steps must be an int, got True"),
    (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    (dict(seed="x"), TypeError, "seed must be an int, got 'x'"),
    (dict(concurrency=0), ValueError, "concurrency must be at least 1, got 0"),
    (dict(lr_interval=0.1), TypeError, "lr_interval must be a pair .* got 0.1"),
    (dict(lr_interval=(0.1,)), TypeError, "lr_interval must be a pair"),
    (dict(lr_interval=(0.0, 0.1)), ValueError, "min_lr must be a finite number in .* got 0.0"),
    (dict(lr_interval=(0.1, 10**400)), ValueError, "max_lr must be a finite number in .* got 1000"),
    (dict(lr_interval=(0.1, math.inf)), ValueError, "max_lr must be a finite number in .* got inf"),
    (dict(lr_interval=(0.1, math.nan)), ValueError, "max_lr must be a finite number in .* got nan"),
    (dict(lr_interval=("a", "b")), TypeError, "min_lr must be a number, got 'a'"),
    (dict(lr_interval=(0.2, 0.1)), ValueError, "min_lr must be below max_lr, got low=0.2, high=0.1"),
    (dict(lr_interval=(0.1, 0.1)), ValueError, "min_lr must be below max_lr"),
    (
        dict(lr_interval=(0.1, 0.1009)),
        ValueError,
        r"lr_interval must span a factor of 1.01 .* got \(0.1, 0.1009\): widen it",
    ),
    (dict(envelope=lambda step: 0.0), ValueError, "the envelope is 0 at every step"),
    (dict(policy="pbt"), ValueError, "policy must be one of .* got 'pbt'"),
    (dict(colour="red"), TypeError, "has no option colour; it has"),
]

BAD_PAPER = [
    (dict(stage_steps=None), ValueError, "needs stage_steps"),
    (dict(stage_steps=0), ValueError, "stage_steps must be at least 1, got 0"),
    (dict(stage_steps=2.5), TypeError, "stage_steps must be an int, got 2.5"),
    (dict(max_stage_steps=10), ValueError, "max_stage_steps must be at least stage_steps.*10"),
    (dict(max_stage_steps=0), ValueError, "max_stage_steps must be at least 1, got 0"),
    (dict(probe_steps=0), ValueError, "probe_steps must be at least 1, got 0"),
    (dict(probe_steps=21), ValueError, "probe_steps must be at most stage_steps.*21"),
    (dict(warmup_steps=-1), ValueError, "warmup_steps must be at least 0, got -1"),
    (dict(warmup_steps=100, warmup_lr=0.1), ValueError, "warmup_steps must be below total_steps.*100"),
    (dict(warmup_steps=5), ValueError, "warmup_lr must be a finite number .* got 0.0"),
    (dict(warmup_steps=5, warmup_lr="x"), TypeError, "warmup_lr must be a number, got 'x'"),
    (dict(num_lrs=0), ValueError, "num_lrs must be at least 1, got 0"),
    (dict(kappa=-1.0), ValueError, "kappa must be a finite number .* got -1.0"),
    (dict(kappa=math.nan), ValueError, "kappa must be a finite number .* got nan"),
    (dict(kappa=True), TypeError, "kappa must be a number, got True"),
    (dict(initial="sobol"), ValueError, "initial must be one of .* got 'sobol'"),
    (dict(fit="adam"), ValueError, "fit must be one of .* got 'adam'"),
    (dict(series="test"), ValueError, "series must be .* got 'test'"),
    (dict(probe_reports=0), ValueError, "probe_reports must be at least 1, got 0"),
    (dict(main_reports=0), ValueError, "main_reports must be at least 1, got 0"),
    (dict(main_reports=1.5), TypeError, "main_reports must be an int, got 1.5"),
    (dict(promote="no"), TypeError, "promote must be True or False, got 'no'"),
    (dict(envelope="square"), ValueError, "unknown envelope 'square'"),
    (dict(envelope=["linear"]), ValueError, r"unknown envelope \['linear'\]"),
    (dict(envelope=lambda step: -1.0), ValueError, "envelope must be finite and >= 0 .* -1.0"),
    (dict(rungs=(0.5,)), TypeError, "has no option rungs"),
]

BAD_ANCHORED = [
    (dict(num_lrs=0), ValueError, "num_lrs must be at least 1, got 0"),
    (dict(num_lrs=3.0), TypeError, "num_lrs must be an int, got 3.0"),
    (dict(commits=0), ValueError, "commits must be at least 1, got 0"),
    (dict(envelope="square"), ValueError, "unknown envelope 'square'"),
    (dict(stage_steps=10), TypeError, "has no option stage_steps"),
]


@pytest.mark.parametrize(
    ("policy", "values", "error", "message"),
    [("paper", *case) for case in BAD + BAD_PAPER] + [("anchored", *case) for case in BAD + BAD_ANCHORED],
)
def test_a_bad_value_is_refused_by_name(policy, values, error, message):
    good = dict(policy=policy, total_steps=100, **(OPTIONS if policy == "paper" else {}))
    values = {**good, **values}
    with pytest.raises(error, match=message):
        make_policy(values.pop("policy"), values.pop("total_steps"), **values)
