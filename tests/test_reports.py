"""What a report must hold, without Ray running: the pair and the replay scheduler check by the same code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autolrs_ray.core.policy import Point
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.reports import ReportKeys, check_lr, point_of, step_of

KEYS = ReportKeys("step", "val_loss", "train_loss", "averaged_loss")
DECAY = Segment("t00", "trunk", 0, 1.0, 0, (50, 100), 2, None, "linear", 100)
FLAT = Segment("main", "main", 0, 1.0, 20, (60,), 2, "checkpoint", None, 100)


def test_a_report_is_a_point_and_a_metric_to_maximise_is_negated() -> None:
    result = {"step": np.int64(30), "val_loss": np.float32(0.5), "train_loss": 2, "other": "x"}
    assert point_of(result, FLAT, KEYS, 1.0, before=None) == Point(30, 0.5, 2.0, None)
    result = {"step": 30.0, "val_loss": 0.5, "averaged_loss": math.inf}
    assert point_of(result, FLAT, KEYS, -1.0, before=None) == Point(30, -0.5, None, -math.inf)


def test_how_many_validation_rows_there_are_counts_where_they_are_scored_by_the_loss() -> None:
    result = {"step": 30, "val_loss": 0.5, "val_accuracy": 0.9, "val_batches": 12.5}
    by = {name: ReportKeys("step", name, "train_loss", "averaged_loss") for name in ("val_loss", "val_accuracy")}
    assert point_of(result, FLAT, by["val_loss"], 1.0, before=None) == Point(30, 0.5, val_batches=12.5)
    guided = Point(30, -0.9, guide=0.5, val_batches=12.5)
    assert point_of(result, FLAT, by["val_accuracy"], -1.0, before=None) == guided
    del result["val_loss"]
    assert point_of(result, FLAT, by["val_accuracy"], -1.0, before=None) == Point(30, -0.9)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ({"val_loss": 1.0}, ValueError, r'does not report "step".*time_attr\. Reported: \[\'val_loss\'\]'),
        (
            {"step": 30, "lr": 1.0, "done": False, "train_loss": 2.0},
            ValueError,
            r"does not report the metric \"val_loss\": report it\. Reported: \['lr', 'step', 'train_loss'\]",
        ),
        (
            {"step": 30, "accuracy": 0.5, "best": True, "val_mse": 2.0},
            ValueError,
            r'does not report the metric "val_loss": report it, or give metric="val_mse", with mode="max" if it is to be',
        ),
        ({"step": True, "val_loss": 1.0}, TypeError, '"step" must be a whole number of optimizer steps, got True'),
        ({"step": 30, "val_loss": None}, TypeError, r'"val_loss" must be a float, got None \(NoneType\)'),
        ({"step": 30, "val_loss": 1.0, "train_loss": "1"}, TypeError, '"train_loss" must be a float'),
        ({"step": 10, "val_loss": 1.0}, ValueError, "restored from a checkpoint at step 20 reports step 10"),
        (
            {"step": 201, "val_loss": 1.0},
            ValueError,
            r'"step" is 201, far past the 100 steps .*, not samples',
        ),
        ({"step": 130, "val_loss": 1.0, "lr": 9.0}, ValueError, "used the learning rate 9"),
        ({"step": 30, "val_loss": 10**400}, TypeError, '"val_loss" must be a float, got an int that no float holds'),
        (
            {"step": 30, "val_loss": 1.0, "lr": 0.5},
            ValueError,
            "used the learning rate 0.5 in place of 1: leave it to AutoLRS",
        ),
    ],
)
def test_a_report_that_cannot_be_used_is_refused(result: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        point_of(result, FLAT, KEYS, 1.0, before=None)


def test_a_report_of_the_state_that_was_restored_says_nothing_new() -> None:
    result = {"step": 20, "val_loss": 1.0}
    assert point_of(result, FLAT, KEYS, 1.0, before=None) is None
    assert point_of(result, FLAT, KEYS, 1.0, before=20) is None


@pytest.mark.parametrize(("before", "step"), [(50, 5), (30, 29), (10**6, 1)])
def test_a_step_that_goes_back_within_a_trial_is_refused(before: int, step: int) -> None:
    with pytest.raises(ValueError, match=f'"step" went back from {before} to {step} within a trial.* not of an epoch'):
        point_of({"step": step, "val_loss": 1.0}, FLAT, KEYS, 1.0, before)


@pytest.mark.parametrize("step", [math.nan, math.inf, -math.inf, 10**400, 2.0**60, np.float64("inf"), -1, 1.5, "3"])
def test_steps_are_whole_numbers(step: Any) -> None:
    with pytest.raises(TypeError, match='"step" must be a whole number'):
        step_of({"step": step}, "step")


def test_a_loss_that_is_not_finite_before_the_first_step_is_no_learning_rates_fault() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        assert point_of({"step": 0, "val_loss": loss, "lr": 1.0}, DECAY, KEYS, 1.0, before=None) is None
    assert point_of({"step": 0, "val_loss": 2.0, "lr": 1.0}, DECAY, KEYS, 1.0, before=None) == Point(0, 2.0)


@pytest.mark.parametrize("lr", [0.5, 0.55, 0.6, np.float32(0.495)])
def test_an_lr_that_the_envelope_had_since_the_report_before_is_taken(lr: float) -> None:
    check_lr({"lr": lr}, DECAY, since=40, step=50)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({}, r"reports no lr: set every step's LR to autolrs_ray\.lr_at"),
        ({"lr": 1.0}, r"at step 50 .* learning rate 1; the envelope gives 0\.6 at step 40 and 0\.5 now: set every"),
        ({"lr": 0.4}, r"used the learning rate 0\.4"),
        ({"lr": math.nan}, "used the learning rate nan"),
    ],
)
def test_another_lr_or_none_is_refused(result: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_lr(result, DECAY, since=40, step=50)
    with pytest.raises(TypeError, match=r"call \.item\(\) on tensors"):
        check_lr({"lr": np.array([0.5])}, DECAY, since=40, step=50)


def test_where_there_is_nothing_to_hold_an_lr_against_any_is_taken() -> None:
    check_lr({}, FLAT, since=20, step=40)
    check_lr({"lr": 1.001}, FLAT, since=20, step=40)
    check_lr({"lr": None}, FLAT, since=20, step=40)
    check_lr({"lr": 0.0}, DECAY, since=100, step=130)  # a report that comes late: its last update was past the end
    check_lr({"lr": 9.0}, DECAY, since=60, step=40)  # the trial was restored from an older checkpoint


@pytest.mark.parametrize(("since", "step", "lr"), [(0, 10, 0.3), (40, 60, 0.5), (40, 60, 0.41), (60, 80, 0.3)])
def test_a_warm_up_is_followed_up_to_its_end_and_down_again(since: int, step: int, lr: float) -> None:
    segment = replace(DECAY, warmup_steps=50)  # 0.02 at step 0, 0.41 at 40, 0.5 at 50, 0.4 at 60
    with pytest.raises(ValueError, match="used the learning rate 1"):
        check_lr({"lr": 1.0}, segment, since, step)
    if since:
        check_lr({"lr": lr}, segment, since, step)
    else:
        with pytest.raises(ValueError, match=r"used the learning rate 0\.3; the envelope gives 0\.02 at step 0"):
            check_lr({"lr": lr}, segment, since, step)


def test_a_constant_envelope_with_a_warm_up_is_followed_too() -> None:
    with pytest.raises(ValueError, match="used the learning rate 1"):
        check_lr({"lr": 1.0}, replace(DECAY, envelope="constant", warmup_steps=50), 0, 10)
