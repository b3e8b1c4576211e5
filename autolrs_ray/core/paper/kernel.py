"""A Gaussian process of one variable in closed form (paper, section 4.1 and appendix A).

x is log LR scaled to [0, 1] over the interval, y a loss. The kernel is Matern-5/2; its hyperparameters are maximum a
posteriori on a small grid, which needs no gradient descent and costs about a millisecond at n <= 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LENGTHSCALES = torch.logspace(math.log10(0.05), math.log10(2.0), 20, dtype=torch.float64)
_NOISES = torch.logspace(-4, -0.5, 8, dtype=torch.float64)  # noise variance over signal variance


@dataclass(frozen=True)
class Hyperparameters:
    """lengthscale in units of x; outputscale and noise are variances in units of the standardised y."""

    lengthscale: float
    outputscale: float
    noise: float


def _matern52(distance: Tensor) -> Tensor:
    d = math.sqrt(5.0) * distance
    return (1.0 + d + d.square() / 3.0) * torch.exp(-d)


def fit_hyperparameters(x: Tensor, y: Tensor) -> Hyperparameters:
    """Maximum a posteriori on a grid of 20 lengthscales x 8 noise ratios; the signal variance has a closed form.

    x: (n,) in [0, 1]. y: (n,) standardised. float64. Priors: log-normal on the lengthscale (median 0.3, sigma 0.8) and
    on the noise ratio (median 1e-3, sigma 2); inverse gamma(2, 1) on the signal variance.
    """
    n = x.numel()
    correlation = _matern52((x[:, None] - x[None, :]).abs() / _LENGTHSCALES[:, None, None])  # (20, n, n)
    eye = torch.eye(n, dtype=x.dtype)
    covariance = correlation[:, None] + _NOISES[None, :, None, None] * eye  # (20, 8, n, n)
    factor = torch.linalg.cholesky(covariance + 1e-10 * eye)
    white = torch.linalg.solve_triangular(factor, y[:, None].expand(*factor.shape[:2], n, 1), upper=False)
    energy = white.square().sum((-2, -1))  # y' K^-1 y
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    outputscale = (0.5 * energy + 1.0) / (0.5 * n + 3.0)
    score = -0.5 * energy / outputscale - 0.5 * log_det - 0.5 * n * outputscale.log()
    score = score - 3.0 * outputscale.log() - 1.0 / outputscale
    score = score - 0.5 * ((_LENGTHSCALES / 0.3).log() / 0.8).square()[:, None]
    score = score - 0.5 * ((_NOISES / 1e-3).log() / 2.0).square()[None, :]
    best = int(score.argmax())
    i, j = divmod(best, _NOISES.numel())
    scale = float(outputscale[i, j])
    return Hyperparameters(float(_LENGTHSCALES[i]), scale, float(_NOISES[j]) * scale)


def standardise(losses: Sequence[float]) -> Tensor:
    """(n,) losses -> (n,) float64 with mean 0 and variance 1. What lies far above the rest is clipped first, so that
    one bad LR cannot flatten the landscape: at the median plus twice the median's height above the minimum."""
    y = torch.tensor(losses, dtype=torch.float64)
    y = y / (y.abs().max() or 1.0)  # squares stay within the range of floats
    if y.numel() >= 3:
        low, median = y.min(), y.quantile(0.5)  # `median` would be the lower of the two middle values
        y = y.clamp(max=float(median + 2.0 * (median - low)) if median > low else float(y.max()))
    y = y - y.mean()
    std = float(y.square().mean().sqrt())
    return y / std if std > 1e-12 else torch.zeros_like(y)


def closed_form_posterior(x: Tensor, y: Tensor, at: Tensor, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent function at `at` (m,), given (x, y) (n,), by one Cholesky factor."""
    k = hyper.outputscale * _matern52((x[:, None] - x[None, :]).abs() / hyper.lengthscale)
    cross = hyper.outputscale * _matern52((at[:, None] - x[None, :]).abs() / hyper.lengthscale)
    factor = torch.linalg.cholesky(k + hyper.noise * torch.eye(x.numel(), dtype=x.dtype))
    mean = cross @ torch.cholesky_solve(y[:, None], factor)[:, 0]
    half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
    return mean, (hyper.outputscale - half.square().sum(0)).clamp_min(1e-12).sqrt()
