"""The Gaussian process as BoTorch models: in closed form, with BoTorch's acquisition and BoTorch's fit.

Importing this module imports BoTorch, which takes about a second: :mod:`autolrs_ray.core.paper.surrogate` does so on first use.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from autolrs_ray.core.paper.kernel import Hyperparameters, closed_form_posterior, fit_hyperparameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they deprecate among themselves; an error here would cost us the surrogate
    import botorch.fit
    import gpytorch
    from botorch.acquisition import UpperConfidenceBound
    from botorch.models import SingleTaskGP
    from botorch.models.model import Model
    from botorch.posteriors import GPyTorchPosterior


class ClosedFormGP(Model):  # type: ignore[misc]
    """Exact GP of (x, y), shapes (n,), float64, y standardised: a BoTorch model whose posterior costs one Cholesky factor.

    Its posterior at (m, 1, 1) points is that of m separate points, which is what acquisition functions for q = 1 ask for.
    """

    num_outputs = 1
    batch_shape = torch.Size()

    def __init__(self, x: Tensor, y: Tensor, hyper: Hyperparameters) -> None:
        super().__init__()
        self.x, self.y, self.hyper = x, y, hyper

    def posterior(self, X: Tensor, *arguments: Any, **options: Any) -> GPyTorchPosterior:  # noqa: N803 - BoTorch's name
        mean, sigma = closed_form_posterior(self.x, self.y, X[..., 0].flatten(), self.hyper)
        normal = gpytorch.distributions.MultivariateNormal(
            mean.view(X.shape[:-1]), torch.diag_embed(sigma.square().view(X.shape[:-1]))
        )
        return GPyTorchPosterior(normal)


def lower_confidence_bound(model: Model, kappa: float, at: Tensor) -> Tensor:
    """kappa * sigma - mu at `at` (m,): the larger, the better."""
    with torch.no_grad():
        bound: Tensor = UpperConfidenceBound(model, beta=kappa**2, maximize=False)(at[:, None, None])
    return bound


def fit_hyperparameters_mll(x: Tensor, y: Tensor) -> Hyperparameters:
    """Hyperparameters by BoTorch's own `fit_gpytorch_mll` (L-BFGS on the marginal likelihood, 50 to 300 ms)."""
    if not y.any():  # the likelihood of a constant has no maximum
        return fit_hyperparameters(x, y)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5))
    model = SingleTaskGP(
        x[:, None], y[:, None], covar_module=kernel, mean_module=gpytorch.means.ZeroMean(), outcome_transform=None
    )
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # retries of the optimiser; a fit that fails for good raises
        botorch.fit.fit_gpytorch_mll(mll)
    return Hyperparameters(
        kernel.base_kernel.lengthscale.item(), kernel.outputscale.item(), model.likelihood.noise.item()
    )
