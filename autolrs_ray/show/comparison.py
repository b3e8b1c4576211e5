"""Several runs side by side: one table, one figure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from autolrs_ray.record.stores import normal, printable
from autolrs_ray.show.main_figures import name_of
from autolrs_ray.show.run_data import RunData, series
from autolrs_ray.show.style import STEPS, count_steps, legend_below, new_figure, scale_loss
from autolrs_ray.show.summary import summary

Row = dict[str, Any]


def comparison(runs: Sequence[RunData]) -> list[Row]:
    """One row per run, the best first: its name, what it found and what it cost.

    Raises ValueError, naming them, where the runs have different metrics or modes: their values are not comparable.
    """
    metrics = {(data.metric, data.config["mode"]) for data in runs}
    if len(metrics) > 1:
        told = ", ".join(
            f"{name} has {data.metric} ({data.config['mode']})" for name, data in zip(names(runs), runs, strict=True)
        )
        raise ValueError(f"these runs have different metrics: {told}")
    rows = []
    for name, data in zip(names(runs), runs, strict=True):
        found = summary(data)
        rows.append(dict(
            run=name, policy=found["policy"], done=found["done"], metric=found["metric"], value=found["value"],
            weights=data.result.weights, peak_lr=data.result.schedule.peak_lr if data.result.schedule.pieces else None,
            steps=found["totals"]["main_steps"], total_steps=found["totals"]["total_steps"],
            compute=found["totals"]["compute"], wall_s=found["totals"]["wall_s"], checkpoint=found["checkpoint"],
        ))  # fmt: skip
    sign = next(data.sign for data in runs)
    return sorted(rows, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0)))


def names(runs: Sequence[RunData]) -> list[str]:
    """The runs' folders by their last part, or whole where that is not unique."""
    folders = [printable(normal(data.history.folder)) for data in runs]
    short = [os.path.basename(folder) for folder in folders]
    counts = Counter(short)
    return [name if counts[name] == 1 else folder for name, folder in zip(short, folders, strict=True)]


def comparison_figure(runs: Sequence[RunData]) -> Any | None:
    """The metric of every run's main training against optimizer steps, of raw or averaged weights, whichever ended better.

    None where no run has reported it.
    """
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    drawn: list[float] = []
    for name, data in zip(names(runs), runs, strict=True):
        key = data.averaged if data.result.weights == "averaged" else data.metric
        steps, values = series(data.main_rows(), data.clock, key)
        if values:
            drawn += values
            label = f"{name} ({values[-1]:.4g}{', averaged weights' if key == data.averaged else ''})"
            axes.plot(steps, values, linewidth=1.8, marker="o" if len(steps) < 30 else None, label=label)
    if not drawn:
        return None
    added = scale_loss(axes, drawn) if runs[0].sign > 0 else ""
    axes.set(xlabel=STEPS, ylabel=name_of(runs[0].metric) + added, title="The main training of each run")
    axes.set_xlim(left=0)
    count_steps(axes.xaxis)
    legend_below(figure, columns=1 if len(runs) < 5 else 2)
    return figure
