"""Plots of the main run: loss, learning rate and accuracy over the training. Matplotlib is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from autolrs_ray.plot_data import AVERAGED, Row, RunData, series
from autolrs_ray.result import winner

NAMES = {"train_loss": "training loss", "val_loss": "validation loss", AVERAGED: "validation loss, averaged weights"}


def new_figure(width: float = 8.0, height: float = 4.5) -> Any:
    """An empty figure of `width` x `height` inches whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def count_steps(axis: Any) -> None:
    """Whole numbers with thousands separators along an axis of optimizer steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axis: Any) -> None:
    """Plain decimals (0.05, not 5 x 10^-2) on a log axis, at 1, 2 and 5 of every decade it shows."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scale_loss(axes: Any, values: Iterable[float]) -> bool:
    """Make y logarithmic where `values` are positive and span more than a factor of 10. Returns True if so."""
    values = list(values)
    if not values or min(values) <= 0.0 or max(values) <= 10.0 * min(values):
        return False
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    return True


def _mark(axes: Any, steps: Sequence[float], label: str) -> None:
    for i, step in enumerate(steps):
        axes.axvline(step, color="0.55", linewidth=0.8, linestyle=":", zorder=0, label=None if i else label)


def boundary_label(data: RunData) -> str:
    return "rungs of the race" if data.anchored else "ends of stages"


def loss_figure(data: RunData) -> Any | None:
    """Training and validation loss of the main run against optimizer steps; None if nothing was reported."""
    rows = data.main_rows()
    keys = ["train_loss", data.metric, AVERAGED]
    if data.sign < 0:  # a metric to be maximised is no loss: draw the validation loss beside it, if there is one
        keys = ["train_loss", "val_loss"] if any("val_loss" in row for row in rows) else [data.metric]
    curves = [(key, *series(rows, data.clock, key)) for key in keys]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    figure = new_figure()
    axes = figure.subplots()
    for key, steps, values in curves:
        look = {"train_loss": ("C0", 1.0), AVERAGED: ("C2", 2.2)}.get(key, ("C1", 1.6))
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, color=look[0], linewidth=look[1], marker=marker, label=NAMES.get(key, key))
    logarithmic = scale_loss(axes, [value for curve in curves for value in curve[2]])
    _mark(axes, data.boundaries(), boundary_label(data))
    name = "loss" if data.sign > 0 or len(curves) > 1 else data.metric
    axes.set(xlabel="iterations (optimizer steps)", ylabel=f"{name} (log scale)" if logarithmic else name,
             title="Loss of the main run", xlim=(0, None))  # fmt: skip
    count_steps(axes.xaxis)
    axes.legend()
    return figure


def learning_rate_figure(data: RunData) -> Any | None:
    """The learned schedule as applied at every step, over the search interval, with what was tried in grey."""
    schedule = data.result.schedule
    if not schedule.pieces:
        return None
    figure = new_figure()
    axes = figure.subplots()
    low, high = data.interval
    axes.axhspan(low, high, color="C0", alpha=0.08, linewidth=0, label="search interval")
    for i, (steps, lrs) in enumerate(_tried(data)):
        axes.plot(steps, lrs, color="0.6", linewidth=1.0, solid_capstyle="butt", label=None if i else "tried")
    for i, piece in enumerate(schedule.pieces):
        steps = _sample(piece.start, piece.end)
        lrs = [schedule.lr_at(step) for step in steps]
        if piece.envelope is None and not piece.warmup_steps:
            steps = [piece.start, piece.end]  # constant: drawn up to where the next stage begins
            lrs = [piece.lr, piece.lr]
        axes.plot(steps, lrs, color="C1", linewidth=2.4, zorder=3, solid_capstyle="butt",
                  label=None if i else "learned schedule")  # fmt: skip
    for before, after in zip(schedule.pieces, schedule.pieces[1:], strict=False):
        ends = [schedule.lr_at(before.end - 1), schedule.lr_at(after.start)]
        axes.plot([after.start] * 2, ends, color="C1", linewidth=0.9, zorder=2)
    axes.set_yscale("log")
    _mark(axes, data.boundaries(), boundary_label(data))
    axes.set(xlabel="iterations (optimizer steps)", ylabel="learning rate (log scale)", title="Learned schedule",
             xlim=(0, data.config["total_steps"]), ylim=(low / 1.6, high * 1.6))  # fmt: skip
    count_steps(axes.xaxis)
    axes.legend(loc="outside lower center" if False else "best")
    return figure


def _sample(start: int, end: int, count: int = 1000) -> list[int]:
    return sorted({start + (end - 1 - start) * i // count for i in range(count + 1)})


def _tried(data: RunData) -> list[tuple[list[int], list[float]]]:
    """Learning rates of the probes over their steps (paper), or of the trunks that did not win (anchored)."""
    if data.anchored:
        return _lost_trunks(data)
    starts = {event["stage"]: event["start"] for event in data.events("stage")}
    return [
        ([starts[event["stage"]], starts[event["stage"]] + event["steps"][-1]], [event["lr"]] * 2)
        for event in data.events("probe")
        if event["stage"] in starts and event["steps"]
    ]


def _lost_trunks(data: RunData) -> list[tuple[list[int], list[float]]]:
    piece = data.result.schedule.pieces[0]
    lrs = {event["arm"]: event["lr"] for event in data.events("proposal")}
    curves = []
    for arm, points in data.scores().items():
        if arm in lrs and arm != winner(data.result.events, data.config):
            steps = [step for step in _sample(0, max(points)) if step < piece.end]
            factors = [data.result.schedule.lr_at(step) / piece.lr for step in steps]
            curves.append((steps, [lrs[arm] * factor for factor in factors]))
    return curves


def accuracy_figure(data: RunData, steps_per_epoch: float | None = None) -> Any | None:
    """Accuracy of the main run against epochs, or against steps where their number per epoch is unknown.

    The epoch of a row is its step / `steps_per_epoch`, or else its own "epoch". None if no accuracy was reported.
    """
    rows = data.main_rows()
    names = sorted({key for row in rows for key in row if _is_accuracy(key)}, key=lambda key: ("val" not in key, key))
    if not names:
        return None
    x, label = data.clock, "iterations (optimizer steps)"
    if steps_per_epoch is not None:
        rows = [{**row, "epoch": row[data.clock] / steps_per_epoch} for row in rows]
    if all("epoch" in row for row in rows):
        x, label = "epoch", "epochs"
    figure = new_figure()
    axes = figure.subplots()
    for i, name in enumerate(names):
        positions, values = series(rows, x, name)
        axes.plot(positions, values, color=f"C{1 + i}", linewidth=1.6 + 0.6 * i, label=name.replace("_", " "))
    axes.set(xlabel=label, ylabel="accuracy (fraction correct)", title="Accuracy of the main run", xlim=(0, None))
    if x == data.clock:
        count_steps(axes.xaxis)
    axes.legend(loc="lower right")
    return figure


def _is_accuracy(key: str) -> bool:
    return key.lower().endswith(("accuracy", "acc"))


def read_rows(rows: Iterable[Row]) -> list[Row]:
    return list(rows)
