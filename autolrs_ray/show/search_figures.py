"""Plots of the paper's search: the surrogate of every stage, and how its forecasts came true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autolrs_ray.core.envelopes import LogInterval
from autolrs_ray.core.events import Event
from autolrs_ray.core.paper import kernel, surrogate
from autolrs_ray.core.paper.policy import PaperPolicy
from autolrs_ray.show.main_figures import NAMES
from autolrs_ray.show.run_data import Row, RunData
from autolrs_ray.show.style import (
    LR,
    legend_below,
    new_figure,
    plain_log,
    scale_loss,
    whole_numbers,
)

MAX_PANELS = 12


def spread(count: int, most: int = MAX_PANELS) -> list[int]:
    """Indices of at most `most` of `count` things: the first, the last and evenly spaced ones between."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


# -- the surrogate, stage by stage ---------------------------------------------------------------------------------------


def posterior(
    x: Sequence[float], losses: Sequence[float], at: Sequence[float], fit: str = "map"
) -> tuple[Any, Any, Any]:
    """The search's own surrogate, given all of a stage: mean and standard deviation at `at`, and the losses as it saw them.

    x, at: (n,), (m,), log LR scaled to [0, 1]; losses: (n,). Returns (m,), (m,) and (n,) tensors in units of the loss.
    """
    y = kernel.standardise(losses)
    points, grid = (torch.tensor(list(values), dtype=torch.float64) for values in (x, at))
    mean, sd = kernel.closed_form_posterior(points, y, grid, surrogate.FITS[fit](points, y))
    order = sorted(range(len(losses)), key=lambda i: losses[i])
    second = next((i for i in order if losses[i] > losses[order[0]]), order[0])
    rise = float(y[second] - y[order[0]])  # `standardise` clips from above, never the second lowest loss: two points
    unit = (losses[second] - losses[order[0]]) / rise if rise > 0 else 0.0  # give its scale and shift back
    base = losses[order[0]] - unit * float(y[order[0]])
    return base + unit * mean, unit * sd, base + unit * y


def surrogate_figure(data: RunData) -> Any | None:
    """Per stage: GP mean and two standard deviations over log LR, the LRs tried, the one chosen. None without stages."""
    probes: dict[int, list[Row]] = {}
    for probe in {event["arm"]: event for event in data.history.named(Event.PROBE)}.values():
        probes.setdefault(probe["stage"], []).append(probe)
    stages = [stage for stage in sorted(probes) if any(probe["status"] == "done" for probe in probes[stage])]
    if data.anchored or not stages:
        return None
    shown = [stages[i] for i in spread(len(stages))]
    columns = min(3, math.ceil(math.sqrt(len(shown))))
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(8.0, 1.6 + (2.2 if columns == 3 else 2.7) * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, stage in zip(panels, shown, strict=False):
        _draw_stage(panel, data, stage, probes[stage])
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xlabel(LR, fontsize=9.5)
    some = "" if len(shown) == len(stages) else f", {len(shown)} of {len(stages)} stages"
    train = "; (train): of the training loss" if _by_training_loss(data) else ""
    figure.suptitle(f"Gaussian process over the learning rate{some}{train}", x=0.01, ha="left", fontsize=12)
    figure.supylabel(f"forecast of the {NAMES.get(data.metric, data.metric)}", fontsize=10.5)
    legend_below(figure, columns=3)
    return figure


def _by_training_loss(data: RunData) -> set[int]:
    """Stages whose probes were ranked by training loss."""
    return {event["stage"] for event in data.history.named(Event.PROBE) if event["series"] == "training"}


def _draw_stage(axes: Any, data: RunData, stage: int, probes: list[Row]) -> None:
    done = [probe for probe in probes if probe["status"] == "done"]
    interval = _interval(data, done)
    grid = [i / 200 for i in range(201)]
    x = [interval.x(probe["lr"]) for probe in done]
    forecasts = [probe["forecast"] for probe in done]
    mean, sd, seen = posterior(x, forecasts, grid, data.config["options"].get("fit", "map"))
    sign = 1.0 if done[0]["series"] == "training" else data.sign
    lrs = [interval.lr(point) for point in grid]
    band = sign * mean - 2 * sd, sign * mean + 2 * sd
    axes.fill_between(lrs, *band, color="C0", alpha=0.2, linewidth=0, label="2 standard deviations")
    axes.plot(lrs, sign * mean, color="C0", linewidth=1.6, label="mean of the GP")
    for clipped, marker, label in ((False, "o", "tried"), (True, "^", "tried, much worse (clipped)")):
        points = [
            (probe["lr"], sign * y)
            for probe, y in zip(done, seen.tolist(), strict=True)
            if math.isclose(probe["forecast"], y, rel_tol=1e-6) != clipped
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="0.2", markersize=5, label=label, zorder=3)
    lost = [probe["lr"] for probe in probes if probe["status"] != "done"]
    if lost:
        axes.plot(lost, [0.04] * len(lost), "x", color="C1", markersize=6, markeredgewidth=1.6, clip_on=False,
                  transform=axes.get_xaxis_transform(), label="diverged or failed", zorder=4)  # fmt: skip
    chosen = _chosen(data, stage)
    at = [sign * y for probe, y in zip(done, seen.tolist(), strict=True) if probe["lr"] == chosen]
    if at:
        axes.plot([chosen], at[:1], "*", color="C1", markeredgecolor="white", markersize=14, zorder=4, label="chosen")
    _name_stage(axes, data, stage)


def _interval(data: RunData, probes: list[Row]) -> LogInterval:
    """The interval that `probes` of one stage came from: a second round, after one without a loss, lies below the first."""
    low, high = data.interval
    per_round = data.config["options"].get("num_lrs", PaperPolicy.num_lrs)
    for _ in range(min(probe["probe"] for probe in probes) // per_round):
        low, high = low / 100.0, low
    return LogInterval(low, high)


def _chosen(data: RunData, stage: int) -> float | None:
    """The LR that trained `stage`, which after a rollback is not the first choice; or the choice, while it trains."""
    lrs = [
        event["lr"]
        for name in (Event.CHOICE, Event.COMMIT)
        for event in data.history.named(name)
        if event["stage"] == stage
    ]
    return lrs[-1] if lrs else None


def _name_stage(axes: Any, data: RunData, stage: int) -> None:
    start = next((event["start"] for event in data.history.named(Event.STAGE) if event["stage"] == stage), None)
    name = f"stage {stage}" + ("" if start is None else f", step {start:,}")
    axes.set_title(name + (" (train)" if stage in _by_training_loss(data) else ""), fontsize=10)
    axes.set_xscale("log")
    axes.tick_params(labelsize=8.5)


# -- forecasts -----------------------------------------------------------------------------------------------------------


def forecast_figure(data: RunData) -> Any | None:
    """Forecast of every stage's chosen LR against the metric that the main run then had. None without forecasts."""
    commits = [] if data.anchored else data.history.stages
    rows = [row for row in commits if row["forecast"] is not None and row["loss"] is not None]
    if not rows:
        return None
    figure = new_figure(6.8, 6.0)
    axes = figure.subplots()
    trained = _by_training_loss(data)
    drawn = None
    realised = [data.sign * row["loss"] for row in rows]
    forecasts = [(1.0 if row["stage"] in trained else data.sign) * row["forecast"] for row in rows]
    low, high = within_reach(realised)
    shown = [*realised, *(value for value in forecasts if low <= value <= high)]
    added, ends = _square(axes, shown, data.sign > 0 and min(shown) > 0.0)
    for series, marker in (("training", "s"), ("validation", "o")):
        of = [i for i, row in enumerate(rows) if (row["stage"] in trained) == (series == "training")]
        if of:
            drawn = axes.scatter(
                [min(max(forecasts[i], ends[0]), ends[1]) for i in of], [realised[i] for i in of], s=60, marker=marker,
                c=[rows[i]["stage"] for i in of], cmap="cividis", vmin=0, vmax=max(1, rows[-1]["stage"]), clip_on=False,
                edgecolors="0.3", label=f"forecast of the {series} loss" if data.sign > 0 else f"{series}, {data.metric}",
                zorder=3,
            )  # fmt: skip
    for value, y in zip(forecasts, realised, strict=True):
        if not low <= value <= high:  # at the edge, with what it was: one that is far off must not set the scale
            left = value < low
            axes.annotate(f"< {value:.3g}" if left else f"{value:.3g} >", (ends[not left], y), textcoords="offset points",
                          xytext=(8 if left else -8, 0), ha="left" if left else "right", va="center", fontsize=9)  # fmt: skip
    axes.set(xlabel=f"forecast at the start of the stage{added}", title="Forecast and outcome of the chosen learning rates",
             ylabel=f"realised: {NAMES.get(data.metric, data.metric)} at the stage's end{added}")  # fmt: skip
    bar = figure.colorbar(drawn, cax=axes.inset_axes((1.04, 0.0, 0.06, 1.0)), label="stage")  # as high as the square
    bar.locator = whole_numbers(8)
    bar.update_ticks()
    legend_below(figure, columns=2)
    return figure


def within_reach(realised: list[float]) -> tuple[float, float]:
    """Between which values a forecast is shown where it lies: by a factor of 3 beyond what came true, or as far beyond as that
    spans."""
    low, high = min(realised), max(realised)
    span = (high - low) or abs(high) or 1.0
    return (low / 3.0, high * 3.0) if low > 0.0 else (low - span, high + span)


def _square(axes: Any, values: list[float], losses: bool) -> tuple[str, tuple[float, float]]:
    """The same scale and range on both axes, and the diagonal; returns what the labels add, and the range."""
    added = scale_loss(axes, values) if losses else ""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    ends = (low / 1.4, high * 1.4) if added else (low - margin, high + margin)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    if added:
        axes.set_xscale("log")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
    axes.plot(ends, ends, color="0.4", linewidth=1.0, linestyle="--", label="forecast = realised", zorder=1)
    return added, ends
