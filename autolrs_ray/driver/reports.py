"""What a trainable reports, checked: every error says how to mend the trainable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from ray.tune.result import AUTO_RESULT_KEYS

from autolrs_ray.core.checks import MOST
from autolrs_ray.core.policy import AutoLRSError, Point
from autolrs_ray.core.segments import Segment

VAL_BATCHES = "val_batches"  # key of the rows of the validation data, in training batches
_MEND = 'set every step\'s LR to autolrs_ray.lr_at(config, step) and report it as "lr"'
_DUE = "Report at the steps that autolrs_ray.integrations.follower.Follower names"
_TOLERANCE = 0.02  # of the LR, for trainables that compute it in single precision
VAL_LOSS, AVERAGED_LOSS = "val_loss", "averaged_loss"  # keys of the loss where the metric is another, to be maximised
_TUNES = {*AUTO_RESULT_KEYS, "done", "should_checkpoint", "trial_id"}
_NO_METRICS = {"lr", "epoch", "stage", "batches", "batch_size", "durable_step", VAL_BATCHES}
_NUMBERS = (int, float, np.integer, np.floating)


@dataclass(frozen=True)
class ReportKeys:
    """The result keys of the optimizer steps done, of the validation metric, and of the mean training loss and the loss of
    averaged weights, which are used where they are reported."""

    step: str
    loss: str
    train: str
    averaged: str


def point_of(
    result: dict[str, Any], segment: Segment, keys: ReportKeys, sign: float, before: int | None
) -> Point | None:
    """A report of `segment` as a Point; sign: of the metric in the loss. before: step of the trial's last report since it was
    started or restored, None for the first. None for a report of the very state that was restored, and for one of a new model
    without a finite loss: they say nothing new.

    Raises ValueError for what is missing, does not follow the learning rate, was not restored or goes back, TypeError for no
    number.
    """
    step = step_of(result, keys.step)
    if before is not None and step < before:
        raise ValueError(
            f'"{keys.step}" went back from {before} to {step} within a trial: it is to count optimizer steps since the '
            "beginning of the run, not of an epoch"
        )
    if segment.total_steps and step > 2 * segment.total_steps:
        raise ValueError(
            f'"{keys.step}" is {step}, far past the {segment.total_steps} steps of the run: count optimizer steps, not samples '
            "or batches of a part of the data, and give total_steps in the same unit"
        )
    if segment.start and step == segment.start:
        return None
    if before is None and step < segment.start:
        raise ValueError(
            f"a trial restored from a checkpoint at step {segment.start} reports step {step}: the trainable does not "
            f'restore its state. Save "{keys.step}", model and optimizer, and load them in load_checkpoint (class) '
            "or from tune.get_checkpoint() (function)."
        )
    check_lr(result, segment, step - max(1, (segment.end - segment.start) // 10), step)
    check_batches(result, segment, step)
    if keys.loss not in result:
        raise ValueError(_without_metric(result, keys))
    loss = sign * _number(result, keys.loss)
    if not step and not math.isfinite(loss):
        return None  # before the first step no learning rate is to blame
    train = _number(result, keys.train) if keys.train in result else None
    averaged = sign * _number(result, keys.averaged) if keys.averaged in result else None
    keys_of_guides = (VAL_LOSS, AVERAGED_LOSS) if sign < 0 and keys.loss != VAL_LOSS and VAL_LOSS in result else ()
    guide, averaged_guide = (_number(result, key) if key in result else None for key in keys_of_guides or ("", ""))
    by_loss = bool(keys_of_guides) or keys.loss == VAL_LOSS
    size = _number(result, VAL_BATCHES) if by_loss and VAL_BATCHES in result else None
    return Point(step, loss, train, averaged, guide, averaged_guide, size)


def refuse_unsaved(segment: Segment, step: int) -> None:
    """For a trial that has never attached a checkpoint, and is to train on until it does: raise AutoLRSError where the run's
    steps are over."""
    if not segment.start and step >= segment.total_steps > 0:
        raise AutoLRSError(
            f"{segment.arm} has trained all {segment.total_steps} steps of the run and attached no checkpoint to a report, so "
            "that nothing can go on from it. Pass checkpoint= to tune.report at every report, or at least at those past a rung"
        )


def step_of(result: dict[str, Any], key: str) -> int:
    """The optimizer steps done, in result[key]. Raises ValueError where it is missing, TypeError if it is no whole number."""
    if key not in result:
        raise ValueError(
            f'the trainable does not report "{key}" (optimizer steps done, restored from checkpoints); add it to every '
            f"report or name another key by time_attr. Reported: {_own(result)}"
        )
    step = result[key]
    if not _is_number(step) or not 0 <= step < math.inf or step != int(step):
        raise TypeError(f'"{key}" must be a whole number of optimizer steps, got {step!r}')
    if step > MOST:
        raise TypeError(f'"{key}" must be a whole number of optimizer steps, got one above 2**53')
    return int(step)


def check_lr(result: dict[str, Any], segment: Segment, since: int, step: int) -> None:
    """Refuse a report, at `step`, of an LR that the envelope did not have between `since` and `step`.

    A trainable that reads config["lr"] once would never decay, and one with a scheduler of its own would not train at what is
    being tried. Where the LR stays the same, it need not be reported. Where a trial has gone back to before `since`, there
    is nothing to hold the LR against. Raises ValueError, or TypeError if the LR is no number.
    """
    constant = segment.envelope is None or segment.envelope == "constant"
    if result.get("lr") is None:
        if constant and not segment.warmup_steps:
            return
        raise ValueError(f"the learning rate follows an envelope, but the trainable reports no lr: {_MEND}")
    used, since = _number(result, "lr"), max(segment.start, since)
    if not since < step:
        return
    turn = min(max(since, segment.warmup_steps), step)  # where the LR is highest, if a warm-up ends in between
    last = segment.total_steps or step  # nobody has asked what a function of the user's gives past the end
    right = [segment.lr_at(min(at, last)) for at in (since, turn, step)]
    if not min(right) * (1.0 - _TOLERANCE) <= used <= max(right) * (1.0 + _TOLERANCE):
        what = f"at step {step} the trainable used the learning rate {used:.4g}"
        if min(right) < max(right):
            wanted = f"; the envelope gives {right[0]:.4g} at step {since} and {right[-1]:.4g} now: "
        else:
            wanted = f" in place of {right[0]:.4g}: leave it to AutoLRS, without a scheduler of your own, and "
        raise ValueError(what + wanted + _MEND)


def too_seldom(segment: Segment, before: int | None, step: int) -> str:
    """What is to be said of a report at `step`, after one at `before`, that comes when a probe has been trained twice as long
    as it was to be, or has passed more than one boundary: its values are not of all of them. "" if neither.

    before: None for the first since the trial was started or restored.
    """
    length, trained = segment.end - segment.start, step - segment.start
    if segment.role == "probe" and trained >= 2 * length:
        return (
            f"reports come too seldom: {segment.arm} was to be trained for {length} steps and reported after {trained}. If all "
            f"probes do, the search takes {trained / length:.2g} times as many steps as was said. {_DUE}, or choose longer "
            "stages (stage_steps) or probes (probe_steps)"
        )
    since = segment.start if before is None else before
    passed = [boundary for boundary in segment.boundaries if since < boundary <= step]
    if len(passed) < 2:
        return ""
    apart = min(b - a for a, b in pairwise(passed))
    return (
        f"reports come too seldom: {segment.arm} reported at step {step} what was to be measured at steps "
        f"{', '.join(map(str, passed[:5]))}{', ...' * (len(passed) > 5)}. Learning rates are compared at fewer steps now, "
        f"which costs compute, and how far losses scatter is not known. {_DUE}, or at least every {apart} steps"
    )


def _own(result: dict[str, Any]) -> list[str]:
    """The keys of a report that Tune has not added."""
    return sorted(str(key) for key in result if key not in _TUNES and not str(key).startswith("config/"))


def check_batches(result: dict[str, Any], segment: Segment, step: int) -> None:
    """Refuse a report, at `step`, of a batch that has not grown as it was to. Raises ValueError."""
    wanted = segment.batches_at(step - 1)
    if segment.start < step <= segment.end and wanted > 1 and result.get("batches") != wanted:
        raise ValueError(
            f"at step {step} the batch is to be {wanted} times as large as at first (batch_growth), but the trainable reports "
            f"batches={result.get('batches')!r}: take so many rows as Follower(config, grows=True).batches_at(step) says, and "
            'report that number as "batches", or leave batch_growth out'
        )


def _without_metric(result: dict[str, Any], keys: ReportKeys) -> str:
    """What is to be said of a report without the metric: which other number may be meant, the first of validation if any is."""
    known = {keys.step, keys.train, *_NO_METRICS}
    others = [key for key in _own(result) if key not in known and _is_number(result.get(key))]
    meant = sorted(others, key=lambda key: not key.startswith("val"))[:1]
    mend = f', or give metric="{meant[0]}", with mode="max" if it is to be high' if meant else ""
    return f'the trainable does not report the metric "{keys.loss}": report it{mend}. Reported: {_own(result)}'


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def _number(result: dict[str, Any], key: str) -> float:
    value = result[key]
    if not _is_number(value):
        mend = "; call .item() on tensors" if hasattr(value, "item") else ""
        raise TypeError(f'"{key}" must be a float, got {value!r:.200} ({type(value).__name__}){mend}')
    try:
        return float(value)
    except OverflowError:
        raise TypeError(f'"{key}" must be a float, got an int that no float holds') from None
