"""Plots of the main run: loss, learning rate and accuracy over the training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from autolrs_ray.core.envelopes import ENVELOPES
from autolrs_ray.core.events import Event
from autolrs_ray.outcome.schedule import LearnedSchedule
from autolrs_ray.show.run_data import RunData, series
from autolrs_ray.show.style import LR, STEPS, count_steps, legend_below, mark_steps, new_figure, scale_loss

Curve = tuple[Sequence[float], Sequence[float]]

AVERAGED = "averaged_loss"
NAMES = {"train_loss": "training loss", "val_loss": "validation loss", AVERAGED: "validation loss, averaged weights"}
_LOOKS = {"train_loss": ("C5", 1.2), "val_loss": ("C1", 1.6), AVERAGED: ("C0", 2.4)}


def name_of(key: str) -> str:
    """What a reported value is called."""
    if key in NAMES or not _is_accuracy(key):
        return NAMES.get(key, key)
    if key.startswith("averaged"):
        return "validation accuracy, averaged weights"
    return key.replace("_", " ").replace("val ", "validation ").replace("train ", "training ")


def boundary_label(data: RunData) -> str:
    return "rungs of the race" if data.anchored else "ends of stages"


def loss_figure(data: RunData) -> Any | None:
    """Training and validation loss of the main run, raw and averaged, against optimizer steps; None if none was reported."""
    rows = data.main_rows()
    keys = ["train_loss", data.metric, data.averaged]
    if data.sign < 0:  # a metric to be maximised is no loss, and has a figure of its own
        keys = ["train_loss", "val_loss", AVERAGED]
    curves = [(key, *series(rows, data.clock, key)) for key in dict.fromkeys(keys)]
    curves = [_averaged(data, *curve) if curve[0] == "train_loss" else curve for curve in curves if curve[1]]
    if not curves:
        return None
    figure = new_figure()
    axes = figure.subplots()
    for key, steps, values in curves:
        look = _LOOKS[AVERAGED] if key == data.averaged else _LOOKS.get(key, ("C1", 1.6))
        _draw_curve(axes, steps, values, look, name_of(key))
    name = "loss" + scale_loss(axes, [value for curve in curves for value in curve[2]])
    mark_steps(axes, data.history.boundaries, boundary_label(data))
    axes.set(xlabel=STEPS, ylabel=name, title="Loss of the main run", xlim=(0, _last(data)))
    count_steps(axes.xaxis)
    legend_below(figure)
    return figure


def _last(data: RunData) -> float:
    """Right end of an axis of steps: a little past the end of the run, or past where it has come."""
    end = data.history.total_steps if data.result.done else max(1, data.result.main_steps)
    return 1.01 * float(end)


def _draw_curve(axes: Any, x: list[float], y: list[float], look: tuple[str, float], label: str) -> None:
    label = f" {label}" if label.startswith("_") else label  # or the legend leaves it out
    axes.plot(x, y, color=look[0], linewidth=look[1], marker="o" if len(x) < 30 else None, label=label)


def _averaged(data: RunData, key: str, steps: list[float], losses: list[float]) -> tuple[str, list[float], list[float]]:
    """Mean training loss over stretches of at least a hundredth of the run.

    A row holds the mean since the row before it, and probes report every few steps: unequal means are no one curve.
    """
    x, y, total, weight, before = [], [], 0.0, 0.0, 0.0
    for step, loss in zip(steps, losses, strict=True):
        total, weight, before = total + loss * (step - before), weight + step - before, step
        if weight >= data.history.total_steps / 100:
            x.append(step)
            y.append(total / weight)
            total = weight = 0.0
    return key, x or steps, y or losses


def learning_rate_figure(data: RunData) -> Any | None:
    """The learned schedule as applied at every step, over the search interval; what else was tried is grey.

    An envelope that was the user's own function cannot be computed again: then it is the learning rates reported.
    """
    learned = _learned(data)
    if not learned:
        return None
    figure = new_figure()
    axes = figure.subplots()
    low, high = data.interval
    axes.axhspan(low, high, color="C0", alpha=0.08, linewidth=0, label="search interval")
    tried, name = (_lost_trunks(data), "other trunks") if data.anchored else (_probes(data), "probes")
    for i, (steps, lrs) in enumerate(tried):
        axes.plot(steps, lrs, color="0.6", linewidth=1.2, solid_capstyle="butt", label=None if i else name)
    for i, (steps, lrs) in enumerate(learned):
        axes.plot(steps, lrs, color="C1", linewidth=2.4, zorder=3, solid_capstyle="butt",
                  label=None if i else "learned schedule")  # fmt: skip
    for (ends, before), (starts, after) in pairwise(learned):
        axes.plot([ends[-1], starts[0]], [before[-1], after[0]], color="C1", linewidth=0.9, zorder=2)
    mark_steps(axes, data.history.boundaries, boundary_label(data))
    lowest = min([low, *(max(lrs) for _, lrs in tried)])
    axes.set(xlabel=STEPS, ylabel=LR, title="Learned schedule", yscale="log", xlim=(0, data.history.total_steps),
             ylim=(lowest / 3, high * 2))  # fmt: skip
    count_steps(axes.xaxis)
    legend_below(figure)
    return figure


def _learned(data: RunData) -> list[Curve]:
    """One curve per piece of the schedule, drawn up to where the next piece begins."""
    schedule = data.result.schedule
    if not _replayable(schedule):
        reported = series(data.main_rows(), data.clock, "lr")
        return [reported] if reported[0] else []
    curves: list[Curve] = []
    for piece in schedule.pieces:
        steps = _sampled(piece.start, piece.end)
        lrs = [schedule.lr_at(step) for step in steps]
        curves.append(([*steps, piece.end], [*lrs, lrs[-1]]))
    return curves


def _replayable(schedule: LearnedSchedule) -> bool:
    return all(piece.envelope is None or piece.envelope in ENVELOPES for piece in schedule.pieces)


def _sampled(start: int, end: int, count: int = 500) -> list[int]:
    """At most `count` + 1 steps of [start, end), both ends among them."""
    return sorted({start + (end - 1 - start) * i // count for i in range(count + 1)})


def _probes(data: RunData) -> list[Curve]:
    starts = {event["stage"]: event["start"] for event in data.history.named(Event.STAGE)}
    return [
        ([starts[event["stage"]], starts[event["stage"]] + event["steps"][-1]], [event["lr"]] * 2)
        for event in data.history.named(Event.PROBE)
        if event["stage"] in starts and event["steps"]
    ]


def _lost_trunks(data: RunData) -> list[Curve]:
    """Schedule of every trunk but the winner, as far as it came: all share the envelope of the learned one."""
    schedule, lrs = data.result.schedule, data.history.lrs
    arms = {arm: max(points) for arm, points in data.scores().items() if arm in lrs and arm != data.arm}
    if not _replayable(schedule):
        curves = [series(data.reports.get(arm, []), data.clock, "lr") for arm in arms]
        return [curve for curve in curves if curve[0]]
    steps = {arm: _sampled(0, last) for arm, last in arms.items() if last > 0}
    scale = schedule.pieces[0].lr
    return [(steps[arm], [schedule.lr_at(step) * lrs[arm] / scale for step in steps[arm]]) for arm in steps]


def accuracy_figure(data: RunData, steps_per_epoch: float | None = None) -> Any | None:
    """Accuracy of the main run, or the metric that the run maximised, against epochs, or against steps where their number per
    epoch is unknown; always on a linear axis.

    The epoch of a row is its step / `steps_per_epoch`, or else its own "epoch". None if neither was reported.
    """
    maximised = {data.metric, data.averaged} if data.sign < 0 else set()
    rows = [row for row in data.main_rows() if any(_is_accuracy(key) or key in maximised for key in row)]
    names = {key for row in rows for key in row if _is_accuracy(key) or key in maximised}
    if maximised and not any(map(_is_accuracy, maximised)):
        names &= maximised  # one axis, one unit
    order = sorted(names, key=lambda key: ("val" not in key, key))
    if not order:
        return None
    if steps_per_epoch is not None:
        rows = [{**row, "epoch": row[data.clock] / steps_per_epoch} for row in rows]
    x, label = ("epoch", "epochs") if all("epoch" in row for row in rows) else (data.clock, STEPS)
    figure = new_figure()
    axes = figure.subplots()
    highest = 0.0
    for name in order:
        colour, width = ("C0", 2.4) if name == data.averaged or name.startswith("averaged") else ("C1", 1.6)
        if name.startswith("train"):
            colour, width = "C5", 1.2
        steps, values = series(rows, x, name)
        highest = max([highest, *values])
        _draw_curve(axes, steps, values, (colour, width), name_of(name))
    what = "accuracy" if all(map(_is_accuracy, order)) else data.metric
    unit = "" if what != "accuracy" else " (per cent)" if highest > 1.5 else " (fraction correct)"
    axes.set(xlabel=label, ylabel=what + unit, title=f"{what[:1].upper()}{what[1:]} of the main run")
    axes.set_xlim(0, None if x == "epoch" else _last(data))
    if x != "epoch":
        count_steps(axes.xaxis)
    legend_below(figure)
    return figure


def _is_accuracy(key: str) -> bool:
    return key.lower().endswith(("accuracy", "acc"))
