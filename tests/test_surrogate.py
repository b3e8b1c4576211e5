"""The surrogate: BoTorch's posterior, our closed form, and proposals that keep within bounds whatever they are told."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from autolrs_ray.core.envelopes import bin_centred_grid
from autolrs_ray.core.paper.gp import ClosedFormGP, fit_hyperparameters_mll, lower_confidence_bound
from autolrs_ray.core.paper.kernel import Hyperparameters, closed_form_posterior, fit_hyperparameters, standardise
from autolrs_ray.core.paper.surrogate import GRID_SIZE, propose, space_filling

GRID = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)


def bowl(x, best=0.6, width=0.25):
    """A loss over log LR as they look: flat at the low end, a basin, a steep rise at the high end."""
    return 2.3 - 1.8 * math.exp(-(((x - best) / width) ** 2)) + 3.0 * max(0.0, x - best - width) ** 2


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.uniform(size=n), dtype=torch.float64)
    return x, standardise([bowl(float(v)) + 0.01 * float(rng.standard_normal()) for v in x])


def single_task_gp(x, y, hyper):
    """BoTorch's own model of (x, y), shapes (n,), with given hyperparameters."""
    import gpytorch  # with `gp` imported before, what they deprecate among themselves is no error here
    from botorch.models import SingleTaskGP

    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).to(torch.float64)
    kernel.outputscale = hyper.outputscale
    kernel.base_kernel.lengthscale = hyper.lengthscale
    model = SingleTaskGP(
        x[:, None],
        y[:, None],
        train_Yvar=torch.full((x.numel(), 1), hyper.noise, dtype=torch.float64),
        covar_module=kernel,
        mean_module=gpytorch.means.ZeroMean(),
        outcome_transform=None,
    )
    model.eval()
    return model


# -- the posterior -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 10, 16, 30])
@pytest.mark.parametrize(
    "hyper", [None, Hyperparameters(0.05, 2.0, 0.01), Hyperparameters(2.0, 0.3, 1e-4), Hyperparameters(0.3, 1.0, 0.3)]
)
def test_botorchs_posterior_is_the_closed_form_to_six_digits(n, hyper):
    x, y = data(n, seed=n)
    hyper = hyper or fit_hyperparameters(x, y)
    with torch.no_grad():
        posterior = single_task_gp(x, y, hyper).posterior(GRID[:, None])
        ours = ClosedFormGP(x, y, hyper).posterior(GRID[:, None, None])
    mean, sigma = closed_form_posterior(x, y, GRID, hyper)
    assert torch.allclose(posterior.mean[:, 0], mean, atol=1e-6, rtol=0.0)
    assert torch.allclose(posterior.variance[:, 0].sqrt(), sigma, atol=1e-6, rtol=0.0)
    assert torch.equal(ours.mean[:, 0, 0], mean)
    assert torch.allclose(ours.variance[:, 0, 0].sqrt(), sigma, atol=1e-12, rtol=0.0)
    assert posterior.mean.dtype == mean.dtype == sigma.dtype == torch.float64


def test_the_bound_is_botorchs_own_to_six_digits():
    x, y = data(10)
    hyper = fit_hyperparameters(x, y)
    ours = lower_confidence_bound(ClosedFormGP(x, y, hyper), 2.0, GRID)
    theirs = lower_confidence_bound(single_task_gp(x, y, hyper), 2.0, GRID)
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0.0)
    assert int(ours.argmax()) == int(theirs.argmax())


def test_any_botorch_acquisition_function_takes_the_model():
    from botorch.acquisition import LogExpectedImprovement

    x, y = data(6)
    model = ClosedFormGP(x, y, fit_hyperparameters(x, y))
    with torch.no_grad():
        value = LogExpectedImprovement(model, best_f=float(y.min()), maximize=False)(GRID[:, None, None])
    assert value.shape == (201,)
    assert torch.isfinite(value).all()


def test_pending_points_leave_the_mean_and_shrink_sigma():
    """GP-BUCB: conditioned on the posterior's own mean at the pending points."""
    x, y = data(6)
    hyper = fit_hyperparameters(x, y)
    mean, sigma = closed_form_posterior(x, y, GRID, hyper)
    pending = torch.stack([GRID[sigma.argmax()], GRID[100]])
    fantasies = closed_form_posterior(x, y, pending, hyper)[0]
    after_mean, after_sigma = closed_form_posterior(torch.cat([x, pending]), torch.cat([y, fantasies]), GRID, hyper)
    assert torch.allclose(after_mean, mean, atol=1e-8)
    assert (after_sigma <= sigma + 1e-12).all()
    assert after_sigma[sigma.argmax()] < 0.2 * sigma.max()


@pytest.mark.parametrize("kappa", [0.3, 2.0])
def test_the_proposal_is_the_lower_confidence_bound_given_the_pending_points_own_means(kappa):
    candidates = torch.linspace(0.0, 1.0, GRID_SIZE, dtype=torch.float64)
    for seed in range(5):
        x, y = data(5, seed)
        losses, pending = (y + 3.0).tolist(), torch.tensor([0.15, 0.85], dtype=torch.float64)
        y, hyper = standardise(losses), fit_hyperparameters(x, standardise(losses))
        fantasies = closed_form_posterior(x, y, pending, hyper)[0]
        mean, sigma = closed_form_posterior(torch.cat([x, pending]), torch.cat([y, fantasies]), candidates, hyper)
        expected = float(candidates[(mean - kappa * sigma).argmin()])
        observed = list(zip(x.tolist(), losses, strict=True))
        assert propose(observed, pending.tolist(), kappa) == pytest.approx(expected, abs=1e-9)


def test_a_pending_point_is_not_proposed_again():
    observed = [(x, bowl(x)) for x in bin_centred_grid(4)]
    pending = []
    for _ in range(5):
        pending.append(propose(observed, pending, 2.0))
    gaps = [abs(a - b) for i, a in enumerate(pending) for b in pending[:i]]
    assert min(gaps) > 2.0 / GRID_SIZE
    without = propose(observed, [], 2.0)
    assert pending[0] == without != pending[1]


# -- hyperparameters ---------------------------------------------------------------------------------------------------


def test_the_map_fit_is_the_best_of_its_grid_by_a_plain_computation():
    from tests.reference import fit

    for n in (1, 2, 4, 9, 16):
        x, y = data(n, seed=n)
        hyper = fit_hyperparameters(x, y)
        assert (hyper.lengthscale, hyper.outputscale, hyper.noise) == pytest.approx(fit(x.numpy(), y.numpy()), rel=1e-9)


@pytest.mark.parametrize("best", [0.2, 0.5, 0.8])
def test_the_map_fit_and_botorchs_own_fit_pick_neighbouring_learning_rates_on_smooth_landscapes(best):
    """Eight points of a smooth landscape: the posterior means have their minima within a tenth of the interval."""
    x = torch.tensor(bin_centred_grid(8), dtype=torch.float64)
    y = standardise([bowl(float(v), best) for v in x])
    picks = []
    for fit in (fit_hyperparameters, fit_hyperparameters_mll):
        mean, _ = closed_form_posterior(x, y, GRID, fit(x, y))
        picks.append(float(GRID[mean.argmin()]))
    assert picks[0] == pytest.approx(picks[1], abs=0.1)
    assert picks[0] == pytest.approx(best, abs=0.05)
    assert bowl(picks[1], best) < bowl(picks[0], best) + 0.15


@pytest.mark.parametrize("fit", ["map", "mll"])
@pytest.mark.parametrize("best", [0.15, 0.45, 0.85])
def test_ten_probes_find_the_basin_with_either_fit(fit, best):
    tried = bin_centred_grid(4)
    while len(tried) < 10:
        tried.append(propose([(x, bowl(x, best)) for x in tried], [], 2.0, fit=fit))
    regret = min(bowl(x, best) for x in tried) / min(bowl(float(x), best) for x in GRID) - 1.0
    assert regret < 0.03


def test_ten_probes_beat_a_grid_of_ten():
    regrets = {"search": [], "grid": []}
    for best in np.linspace(0.1, 0.9, 9):
        tried = bin_centred_grid(4)
        while len(tried) < 10:
            tried.append(propose([(x, bowl(x, best, 0.08)) for x in tried], [], 2.0))
        least = min(bowl(float(x), best, 0.08) for x in GRID)
        for name, xs in (("search", tried), ("grid", bin_centred_grid(10))):
            regrets[name].append(min(bowl(x, best, 0.08) for x in xs) / least - 1.0)
    assert np.mean(regrets["search"]) < np.mean(regrets["grid"])


# -- proposals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upper", [0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("kappa", [0.0, 2.0, 1000.0, 1e6])
def test_proposals_stay_within_the_upper_bound(upper, kappa):
    observed = [(x, bowl(x)) for x in (0.1, 0.2, 0.9)]
    for seen, pending in ((observed, []), (observed, [0.25, 0.95]), ([], [0.25]), ([], [])):
        assert 0.0 <= propose(seen, pending, kappa, upper) <= upper


def _cases():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 30):
        x = rng.uniform(size=n)
        yield f"{n} over 12 decades", x, 10.0 ** rng.uniform(-6, 6, size=n)
        yield f"{n} duplicates", np.full(n, 0.4), rng.uniform(size=n)
        yield f"{n} equal losses", x, np.full(n, 1.7)
        yield f"{n} ends only", rng.integers(0, 2, size=n).astype(float), rng.standard_normal(n)
        yield f"{n} tiny", x, 1e-300 * rng.uniform(size=n)
        yield f"{n} one outlier", x, np.where(np.arange(n) == 0, 1e30, 1.0 + x)


@pytest.mark.parametrize(("x", "losses"), [pytest.param(x, y, id=name) for name, x, y in _cases()])
@pytest.mark.parametrize("fit", ["map", "mll"])
def test_proposals_are_numbers_whatever_was_observed(x, losses, fit):
    observed = list(zip(x.tolist(), losses.tolist(), strict=True))
    for pending in ([], [0.4], [0.4, 0.4, 1.0]):
        for kappa in (0.0, 2.0, 1000.0):
            proposal = propose(observed, pending, kappa, fit=fit if not pending and kappa == 2.0 else "map")
            assert 0.0 <= proposal <= 1.0


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_the_unit_and_the_level_of_the_loss_do_not_matter(scale):
    xs = bin_centred_grid(5)
    assert propose([(x, scale * (bowl(x) + 7.0)) for x in xs], [], 2.0) == propose([(x, bowl(x)) for x in xs], [], 2.0)


def test_one_very_bad_learning_rate_does_not_flatten_the_landscape():
    xs = [0.1, 0.3, 0.5, 0.7]
    with_bad = propose([(x, bowl(x)) for x in xs] + [(0.95, 1e6)], [], 0.1)
    assert with_bad == pytest.approx(propose([(x, bowl(x)) for x in xs] + [(0.95, 5.0)], [], 0.1), abs=0.02)
    assert with_bad == pytest.approx(0.6, abs=0.1)


def test_standardised_losses_have_mean_0_and_variance_1_in_float64():
    y = standardise([3.0, 1.0, 2.0, 1.5])
    assert y.dtype == torch.float64
    assert float(y.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(y.square().mean()) == pytest.approx(1.0)
    assert standardise([2.0, 2.0, 2.0]).tolist() == [0.0, 0.0, 0.0]
    clipped = standardise([1.0, 2.0, 3.0, 4.0, 1e9])  # median 3, minimum 1: clipped at 7
    assert (clipped[4] - clipped[3]) / (clipped[1] - clipped[0]) == pytest.approx(3.0)


def test_proposals_apart_keep_their_distance_while_there_is_room():
    observed = [(x, bowl(x)) for x in (0.5, 0.6, 0.7)]
    assert min(abs(propose(observed, [0.3], 0.1, apart=0.08) - x) for x in (0.3, 0.5, 0.6, 0.7)) >= 0.08
    assert 0.0 <= propose(observed, [], 0.1, apart=2.0) <= 1.0


def test_without_observations_proposals_fill_the_space():
    assert space_filling([]) == 0.5
    assert space_filling([], 0.2) == 0.1
    assert space_filling([0.5]) in (0.0, 1.0)
    assert space_filling([0.0, 1.0]) == pytest.approx(0.5, abs=1e-3)
    assert propose([], [0.0, 1.0], 2.0) == space_filling([0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_proposals_are_float64_whatever_torchs_default_and_draw_no_random_numbers(dtype):
    observed = [(x, bowl(x)) for x in (0.1, 0.4, 0.8)]
    before, state = propose(observed, [0.6], 2.0), torch.random.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        assert propose(observed, [0.6], 2.0) == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_proposal_costs_milliseconds():
    """Measured 4 ms on one loaded core; 50 allow for a slow machine and still exclude a gradient fit."""
    observed = [(x, bowl(x)) for x in bin_centred_grid(10)]
    propose(observed, [], 2.0)
    began = time.perf_counter()
    for _ in range(10):
        propose(observed, [0.33], 2.0)
    assert (time.perf_counter() - began) / 10 < 0.05
