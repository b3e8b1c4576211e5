"""The paper's Algorithm 1 in plain NumPy and SciPy, one probe after the other: the slow twin of PaperPolicy at q = 1."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve


def matern52(a, b, lengthscale):
    d = np.sqrt(5.0) * np.abs(np.subtract.outer(a, b)) / lengthscale
    return (1.0 + d + d**2 / 3.0) * np.exp(-d)


def fit(x, y):
    """Lengthscale, signal variance and noise variance of highest posterior density, by trying all of a grid."""
    best = (-np.inf, 0.0, 0.0, 0.0)
    for lengthscale in np.geomspace(0.05, 2.0, 20):
        for noise in np.logspace(-4, -0.5, 8):
            factor = cho_factor(matern52(x, x, lengthscale) + (noise + 1e-10) * np.eye(len(x)), lower=True)
            energy = y @ cho_solve(factor, y)
            scale = (energy / 2 + 1) / (len(x) / 2 + 3)
            density = -energy / (2 * scale) - np.log(np.diag(factor[0])).sum() - len(x) / 2 * np.log(scale)
            density += -3 * np.log(scale) - 1 / scale  # inverse gamma(2, 1)
            density -= (np.log(lengthscale / 0.3) / 0.8) ** 2 / 2 + (np.log(noise / 1e-3) / 2.0) ** 2 / 2
            best = max(best, (density, lengthscale, scale, noise * scale))
    return best[1:]


def lower_confidence_bound(x, losses, kappa, apart=0.0):
    """argmin of mu - kappa * sigma over the points, of 1,001 of log LR, that lie `apart` from all x."""
    x, y, grid = np.array(x), np.array(losses), np.linspace(0.0, 1.0, 1001)
    if len(y) >= 3 and np.median(y) > y.min():
        y = np.minimum(y, np.median(y) + 2 * (np.median(y) - y.min()))
    y = (y - y.mean()) / y.std() if y.std() > 1e-12 else 0 * y
    lengthscale, scale, noise = fit(x, y)
    factor = cho_factor(scale * matern52(x, x, lengthscale) + noise * np.eye(len(x)))
    cross = scale * matern52(grid, x, lengthscale)
    variance = scale - np.einsum("ij,ji->i", cross, cho_solve(factor, cross.T))
    bound = cross @ cho_solve(factor, y) - kappa * np.sqrt(np.maximum(variance, 1e-12))
    return grid[np.argmin(np.where(np.abs(grid[:, None] - x).min(1) < apart, np.inf, bound))]


def forecasts(tried, forecast, tau, began):
    of_stage = [series for series, *_ in tried]
    return [forecast(series, of_stage, tau, began) for series in of_stage]


def algorithm1(state, probe, train, forecast, first_x, total, tau, tau_max, probe_tau, k, kappa, low, high, apart):
    """probe(state, lr, steps) -> (training series, validation series); forecast(series, all series of the stage so far, tau,
    loss where the stage began or None) -> loss; train(state, lr, steps) -> (state, (training loss, validation loss)).

    The training loss ranks up to the first stage of tau_max steps, the validation loss after it.
    """
    start, history, began, validate = 0, [], (None, None), False
    while start < total:
        steps, tried = min(tau, total - start), []

        for i in range(k):
            values = forecasts(tried, forecast, steps, began[validate])
            x = lower_confidence_bound([t[1] for t in tried], values, kappa, apart) if i else first_x(len(history))
            lr = np.exp(np.log(low) + x * (np.log(high) - np.log(low)))
            tried.append((probe(state, lr, min(steps, probe_tau))[validate], x, lr))
        best = int(np.argmin(forecasts(tried, forecast, steps, began[validate])))
        state, began = train(state, tried[best][2], steps)
        history.append(
            dict(start=start, steps=steps, probe_steps=min(steps, probe_tau), tried=tried, best=best, validate=validate)
        )
        start, validate = start + steps, tau >= tau_max
        tau, probe_tau = min(2 * tau, tau_max), min(2 * probe_tau, round(tau_max * probe_tau / tau))
    return state, history
