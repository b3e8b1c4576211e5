"""One proposal of a learning rate, against scikit-optimize's ask and tell with the settings of AutoLRS' authors; one
forecast of a loss series. One thread, after warm-up."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from skopt import Optimizer
from skopt.space import Real

from autolrs_ray.core.paper import kernel, surrogate
from autolrs_ray.core.paper.forecast import forecast
from autolrs_ray.training.trainer import Trainer
from benchmarks.section import Section, spread
from experiments.digits_task import build

LRS = np.geomspace(1e-3, 1.0, 10)


def _timed(call: Callable[[], object], repeats: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each of `repeats` calls."""
    times = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        call()
        times.append(1000.0 * (time.perf_counter() - began))
    return times[warm_up:]


def recorded_series(points: int = 16, every: int = 5) -> list[list[float]]:
    """Validation losses of the digits task at ten learning rates, `every` steps apart."""
    trainer, found = Trainer(lambda: build({})), []
    for lr in LRS.tolist():
        trainer.reset()
        series = []
        for i in range(1, points + 1):
            trainer.train(every * i, lambda step, lr=lr: lr)
            series.append(trainer.evaluate()["loss"])
        found.append(series)
    return found


def _skopt_proposal(observed: list[tuple[float, float]]) -> Callable[[], object]:
    def call() -> object:
        optimizer = Optimizer(
            [Real(1e-3, 1.0, prior="log-uniform")], base_estimator="GP", n_initial_points=1, acq_func="LCB",
            acq_func_kwargs={"kappa": 1000}, random_state=0,
        )  # fmt: skip
        for lr, loss in observed[:-1]:
            optimizer.tell([lr], loss, fit=False)
        optimizer.tell([observed[-1][0]], observed[-1][1])
        return optimizer.ask()

    return call


def measure(quick: bool) -> Section:
    torch.set_num_threads(1)
    series = recorded_series()
    losses = [curve[-1] for curve in series]
    x = ((np.log(LRS) - np.log(1e-3)) / np.log(1e3)).tolist()
    repeats = 5 if quick else 30
    steps = [5 * i for i in range(1, len(series[0]) + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-optimize: deprecated calls, fits that hit a bound
        theirs = _timed(_skopt_proposal(list(zip(LRS.tolist(), losses, strict=True))), repeats)
    ours = _timed(lambda: surrogate.propose(list(zip(x, losses, strict=True)), [], 2.0), repeats)
    mll = _timed(
        lambda: surrogate.propose(list(zip(x, losses, strict=True)), [], 2.0, 1.0, "mll"), max(3, repeats // 3)
    )
    values, at = kernel.standardise(losses), torch.tensor(x, dtype=torch.double)
    fit = _timed(lambda: kernel.fit_hyperparameters(at, values), repeats)
    forecasts = [time for curve in series for time in _timed(lambda curve=curve: forecast(steps, curve, 800), repeats)]
    median, reference = statistics.median, statistics.median(theirs)
    rows = [
        (name, spread(times, 2), f"{reference / median(times):.1f}")
        for name, times in (
            ("proposal: scikit-optimize, tell + ask", theirs),
            ("proposal: ours (MAP on a grid, BoTorch's UCB)", ours),
            ("proposal: ours with BoTorch's own fit", mll),
            ("of it, hyperparameters on the grid", fit),
        )
    ]
    rows.append(("forecast of one series of 16 points", spread(forecasts, 3), ""))
    return Section(
        "Proposal at n = 10 and forecast, on losses recorded from the digits task, ms, median (min-max)",
        ("what", "ms", "times faster than scikit-optimize"),
        rows,
        figures={"proposal_ms": median(ours), "proposal_speedup": reference / median(ours)},
    )
