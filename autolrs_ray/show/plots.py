"""A finished or running run in pictures, drawn from its journal and from what its trials reported, where that is left.

loss           training and validation loss of the main run over the optimizer steps
learning_rate  the learned schedule as applied, over the search interval
accuracy       over epochs, if an accuracy was reported
surrogate      paper: the Gaussian process of every stage, the LRs tried and the one chosen
forecast       paper: forecast against outcome
race           anchored: the averaged score of every trunk
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from autolrs_ray.record.stores import is_uri, join, upload
from autolrs_ray.show.main_figures import accuracy_figure, learning_rate_figure, loss_figure
from autolrs_ray.show.race_figure import race_figure
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.search_figures import forecast_figure, surrogate_figure
from autolrs_ray.show.style import show_names_as_they_are, style


def save_plots(
    run: str | os.PathLike[str] | RunData,
    output: str | os.PathLike[str] | None = None,
    steps_per_epoch: float | None = None,
) -> list[Path] | list[str]:
    """Draw every plot that `run`, a folder or its URI, has data for; returns the files written, a PNG and an SVG of each.

    output: folder to write to, or its URI, made if need be (default: plots in the run's). steps_per_epoch: optimizer
    steps per epoch, for the accuracy's axis, where the trials do not report "epoch".

    Raises FileNotFoundError where there is no journal, ValueError if the run never started or steps_per_epoch <= 0.
    """
    if steps_per_epoch is not None and not steps_per_epoch > 0:
        raise ValueError(f"steps_per_epoch must be positive, got {steps_per_epoch}")
    data = RunData.of(run)
    target = join(os.fspath(data.history.folder), "plots") if output is None else os.fspath(output)
    if is_uri(target):
        with tempfile.TemporaryDirectory(prefix="autolrs-") as local:
            _draw(data, Path(local), steps_per_epoch)
            return upload(Path(local), target)
    return _draw(data, Path(target), steps_per_epoch)


def _draw(data: RunData, target: Path, steps_per_epoch: float | None) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[RunData], Any | None]] = {
        "loss": loss_figure,
        "learning_rate": learning_rate_figure,
        "accuracy": partial(accuracy_figure, steps_per_epoch=steps_per_epoch),
        "surrogate": surrogate_figure,
        "forecast": forecast_figure,
        "race": race_figure,
    }
    written = []
    with style():
        for name, draw in figures.items():
            figure = draw(data)
            if figure is None:
                continue
            show_names_as_they_are(figure)
            for suffix in ("png", "svg"):
                path = target / f"{name}.{suffix}"
                figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)  # same run, same bytes
                written.append(path)
    return written
