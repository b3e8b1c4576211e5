"""Gaussian process over log LR and its lower confidence bound (paper, section 4.1).

x is log LR scaled to [0, 1] over the interval, y a loss. The model is a BoTorch model in closed form
(:class:`autolrs_ray.core.paper.gp.ClosedFormGP`), the acquisition BoTorch's `UpperConfidenceBound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from autolrs_ray.core.paper.kernel import Hyperparameters, closed_form_posterior, fit_hyperparameters, standardise

GRID_SIZE = 1001
"""Candidates of a proposal: equally spaced in log LR, both ends included."""


def preload() -> ModuleType:
    """Import BoTorch, which takes about a second, now: for whoever has time to spare."""
    return import_module("autolrs_ray.core.paper.gp")


def _fit_by_botorch(x: Tensor, y: Tensor) -> Hyperparameters:
    hyper: Hyperparameters = preload().fit_hyperparameters_mll(x, y)
    return hyper


FITS = {"map": fit_hyperparameters, "mll": _fit_by_botorch}
"""How hyperparameters are found: (x, y) -> Hyperparameters."""


def space_filling(tried: Sequence[float], upper: float = 1.0) -> float:
    """The x in [0, upper] farthest from all those `tried`; the middle if there are none."""
    if not tried:
        return upper / 2.0
    grid = torch.linspace(0.0, upper, GRID_SIZE, dtype=torch.float64)
    z = torch.tensor(list(tried), dtype=torch.float64)
    return float(grid[int((grid[:, None] - z).abs().min(1).values.argmax())])


def propose(
    observed: Sequence[tuple[float, float]],
    pending: Sequence[float],
    kappa: float,
    upper: float = 1.0,
    fit: str = "map",
    apart: float = 0.0,
) -> float:
    """Next x in [0, upper] by the lower confidence bound mu - kappa * sigma (argmin over a log grid).

    observed: (x, loss) pairs with finite losses. pending: x of probes that still run; they enter with the posterior's
    own mean as their value (GP-BUCB, Desautels et al. 2014): the mean stays and sigma shrinks around them.
    upper: x above this are forbidden (a probe diverged there). apart: so far from every other x; where there is no such
    room, the x farthest from all others.
    """
    if not observed:  # the prior mean is flat, so only sigma counts
        return space_filling(pending, upper)
    grid = torch.linspace(0.0, upper, GRID_SIZE, dtype=torch.float64)
    z = torch.tensor(list(pending), dtype=torch.float64)
    x = torch.tensor([point for point, _ in observed], dtype=torch.float64)
    y = standardise([loss for _, loss in observed])
    gp = preload()
    hyper = FITS[fit](x, y)
    if len(pending):
        fantasies, _ = closed_form_posterior(x, y, z, hyper)
        x, y = torch.cat([x, z]), torch.cat([y, fantasies])
    value = gp.lower_confidence_bound(gp.ClosedFormGP(x, y, hyper), kappa, grid)
    near = (grid[:, None] - x).abs().min(1).values < apart
    if near.all():
        return space_filling(x.tolist(), upper)
    value[near] = -math.inf
    return float(grid[int(value.argmax())])
