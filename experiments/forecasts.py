"""How well is a stage's end forecast from its probes, and which learning rate does that choose?

    python -m experiments.forecasts        # a minute; writes experiments/results/forecasts.md

On the landscapes of `experiments.landscapes`: from the validation losses of a probe, a tenth of the stage, to the loss at the
stage's end. Error: of the learning rates that gain, the median of |forecast - loss| / loss. Lost: ten learning rates over six
decades are ranked; the loss of the first, above the best of the ten, as a share of what the landscape's best gains (a stage
that diverged counts as 4 times its start). Risen: choices whose stage ended above its start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from autolrs_ray.core.paper.forecast import forecast, tail_mean
from experiments.landscapes import LRS, STAGE_STEPS, Landscape, load
from experiments.regrets import LEAST_DEPTH
from experiments.tables import markdown

OUT = Path(__file__).parent / "results" / "forecasts.md"
EXPONENTS = np.geomspace(0.05, 3.0, 25)
Forecaster = Callable[[Landscape, np.ndarray], float]  # landscape, series of one probe -> the loss at the stage's end


def ours(landscape: Landscape, losses: np.ndarray) -> float:
    return forecast(landscape.steps.tolist(), losses.tolist(), STAGE_STEPS, 0.0, landscape.start).value


def start_unknown(landscape: Landscape, losses: np.ndarray) -> float:
    """As in a run's first stage: the lower quartile of the first reports of ten probes."""
    first = sorted(landscape.val[3::6, 0].tolist())
    return forecast(landscape.steps.tolist(), losses.tolist(), STAGE_STEPS, 0.0, first[len(first) // 4]).value


def unbounded(landscape: Landscape, losses: np.ndarray) -> float:
    """The same fit from a start so high that nothing bounds the credit."""
    high = 1e4 * float(np.abs(losses).max())
    return forecast(landscape.steps.tolist(), losses.tolist(), STAGE_STEPS, 0.0, high).value


def mean(landscape: Landscape, losses: np.ndarray) -> float:
    return tail_mean(losses)


def _power_law(steps: np.ndarray, losses: np.ndarray, horizon: float) -> float:
    """c + a * (t + 1)^-p by least squares, c >= 0; the last loss where it falls nowhere."""
    found = (np.inf, float(losses[-1]))
    for exponent in EXPONENTS:
        basis = (steps + 1.0) ** -exponent
        centred = basis - basis.mean()
        a = (centred @ (losses - losses.mean())) / (centred**2).sum()
        c = losses.mean() - a * basis.mean()
        if c < 0.0:
            a, c = (basis @ losses) / (basis @ basis), 0.0
        if a > 0.0:
            value = float(a * (horizon + 1.0) ** -exponent + c)
            found = min(found, (float(((a * basis + c - losses) ** 2).sum()), value))
    return found[1]


def power_of_stage(landscape: Landscape, losses: np.ndarray) -> float:
    return _power_law(np.r_[0.0, landscape.steps], np.r_[landscape.start, losses], STAGE_STEPS)


def power_of_run(landscape: Landscape, losses: np.ndarray) -> float:
    """Through the main trial's losses since the run's start, and the probe's."""
    begun = -landscape.history[0, 0]
    steps = np.r_[landscape.history[:, 0], landscape.steps] + begun
    return _power_law(steps, np.r_[landscape.history[:, 1], losses], STAGE_STEPS + begun)


FORECASTERS: dict[str, Forecaster] = {
    "ours": ours,
    "ours, the start unknown": start_unknown,
    "the same fit without bounds": unbounded,
    "mean of the last fifth": mean,
    "power law since the stage's start": power_of_stage,
    "power law since the run's start": power_of_run,
}


def measure(forecaster: Forecaster, landscapes: list[Landscape]) -> list[str]:
    errors, lost, risen = [], [], []
    for landscape in landscapes:
        depth = landscape.start - landscape.final.min()
        if depth <= LEAST_DEPTH * landscape.start:
            continue
        values = np.array([forecaster(landscape, y) if np.isfinite(y).all() else np.inf for y in landscape.val])
        gained = np.isfinite(values) & (landscape.final < landscape.start)
        errors += (np.abs(values - landscape.final)[gained] / landscape.final[gained]).tolist()
        for first in range(6):
            ten = np.arange(first, LRS, 6)[:10]
            end = min(landscape.final[ten[values[ten].argmin()]], 4.0 * landscape.start)
            lost.append((end - landscape.final[ten].min()) / depth)
            risen.append(end > landscape.start)
    return [f"{np.median(errors):.3f}", f"{np.mean(lost):.3f}", f"{np.median(lost):.3f}", f"{100 * np.mean(risen):.1f}"]


def main() -> None:
    np.seterr(all="ignore")  # losses up to 1e4 times the start
    landscapes = load()
    heads = ["forecaster", "error, median", "lost, mean", "lost, median", "risen, %"]
    lines = [[name, *measure(forecaster, landscapes)] for name, forecaster in FORECASTERS.items()]
    text = (
        "# Forecasts\n\nMade by `python -m experiments.forecasts`, which says what the columns are; "
        f"{len(landscapes)} landscapes.\n\n{markdown(heads, lines)}\n"
    )
    OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
