"""Loss series -> the loss to expect at a later step.

The paper (section 4.2) fits L(t) = a * exp(b * t) + c to the losses of a probe. Given b the fit is linear in a and c,
so b alone is searched (variable projection); guards keep the result within what the series supports. Never raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DECAYS = np.geomspace(0.5, 30.0, 60)  # -b in units of 1 / (length of the series): the series' own time scale


@dataclass(frozen=True)
class Forecast:
    """Expected loss at the horizon, its standard error, and how it was had: "exponential", "mean" or "diverged".

    failure: why there is no fit, where there should be one.
    """

    value: float
    stderr: float
    method: str
    failure: str = ""


def tail_mean(losses: Sequence[float] | np.ndarray) -> float:
    """Mean of the last fifth (at least 3, where there are as many) of the series: the ranking nothing has beaten yet."""
    values = np.asarray(losses, dtype=float)
    return float(values[-max(min(3, len(values)), len(values) // 5) :].mean())


def forecast(
    steps: Sequence[int],
    losses: Sequence[float],
    horizon: int,
    floor: float | None = 0.0,
    start: float | None = None,
) -> Forecast:
    """Forecast the loss at step `horizon`.

    steps: (n,) optimizer steps since the start of the stage, increasing. losses: (n,) losses there.
    floor: lower bound of the asymptote c; None where the metric has none, and no bound once a loss lies below it.
    start: the loss at step 0, from which training began; None takes the first of the series.

    A series with a value that is not finite gives value inf ("diverged"). Fewer than 4 points, and a series that has not
    gained on its start, or lost more on its way than it has gained in the end, give the mean of their last points. What is
    credited for the steps to come is never more than what was gained since the start.
    """
    t = np.asarray(steps, dtype=float)
    y = np.asarray(losses, dtype=float)
    if len(y) == 0 or not np.all(np.isfinite(y)):
        return Forecast(float("inf"), float("inf"), "diverged")
    began = start if start is not None and math.isfinite(start) else float(y[0])
    size = max(float(np.abs(y).max()), abs(began)) or 1.0  # in units of it, squares stay within the range of floats
    if floor is not None and min(float(y.min()), began) < floor:
        floor = None
    try:
        scaled = _forecast(t, y / size, horizon, None if floor is None else floor / size, began / size)
    except Exception as error:  # no probe is worth the run
        return Forecast(
            tail_mean(y / size) * size, float((y / size).std()) * size, "mean", f"{type(error).__name__}: {error}"
        )
    return Forecast(scaled.value * size, scaled.stderr * size, scaled.method)


def _forecast(t: np.ndarray, y: np.ndarray, horizon: int, floor: float | None, start: float) -> Forecast:
    """The same for (n,) finite losses of magnitude 1 at most."""
    naive = tail_mean(y)
    spread = float(y.std()) if len(y) > 1 else abs(naive)
    gained, lost = start - naive, float(y.max()) - start
    if len(y) < 4 or t[-1] <= t[0] or spread <= 1e-12 or gained <= max(0.0, lost):
        return Forecast(naive, spread, "mean")
    span = t[-1] - t[0]
    u = (t - t[0]) / span
    basis = np.exp(-_DECAYS[:, None] * u)  # (60, n)
    centred = basis - basis.mean(1, keepdims=True)
    a = centred @ (y - y.mean()) / np.maximum((centred**2).sum(1), 1e-300)
    c = y.mean() - a * basis.mean(1)
    if floor is not None:
        low = c < floor
        a = np.where(low, (basis @ (y - floor)) / np.maximum((basis**2).sum(1), 1e-300), a)
        c = np.where(low, floor, c)
    residual = ((a[:, None] * basis + c[:, None] - y) ** 2).sum(1)
    # a flat prior would let b -> 0, a straight line into the future: charge decays slower than the series' own length
    scale = residual.min() + 1e-3 * ((y - y.mean()) ** 2).sum() + 1e-300
    cost = len(y) * np.log(residual + scale) + 1.5 * np.log(_DECAYS / 3.0) ** 2
    best = int(np.argmin(np.where(a > 0, cost, np.inf)))
    if a[best] <= 0:
        return Forecast(naive, spread, "mean")
    stderr = float(np.sqrt(residual[best] / max(1, len(y) - 3)))
    value = float(a[best] * np.exp(-_DECAYS[best] * (horizon - t[0]) / span) + c[best])
    return Forecast(min(max(value, naive - gained), naive), stderr, "exponential")
