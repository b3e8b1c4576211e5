"""The forecaster: it never raises, is right where the paper's model is true, and is measured against the naive mean."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autolrs_ray.core.paper.forecast import forecast, tail_mean
from autolrs_ray.core.paper.probes import Start, judge
from autolrs_ray.core.paper.proposals import Probe
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from experiments.digits_task import split

TAU, PROBE, POINTS = 200, 20, 16


# -- it never raises ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), max_size=40),
    st.integers(0, 10**6),
    st.one_of(st.none(), st.floats(-1e6, 1e6)),
)
def test_it_never_raises_warns_or_gives_nan_whatever_the_series(losses, horizon, floor):
    result = forecast(range(1, len(losses) + 1), losses, horizon, floor)
    assert not math.isnan(result.value)
    assert not math.isnan(result.stderr)
    assert result.stderr >= 0.0
    finite = len(losses) > 0 and all(math.isfinite(loss) for loss in losses)
    assert (result.method == "diverged") == (not finite)
    assert finite == math.isfinite(result.value)


@pytest.mark.parametrize("exponent", range(-300, 301, 50))
def test_units_do_not_matter_over_600_decades(exponent):
    t = np.arange(1, 17)
    rng = np.random.default_rng(0)
    series = 2.0 * np.exp(-0.15 * t) + 0.7 + 0.01 * rng.standard_normal(16)
    scale = 10.0**exponent
    one, other = forecast(t, series, 160), forecast(t, scale * series, 160)
    assert other.value == pytest.approx(one.value * scale, rel=1e-9)
    assert other.stderr == pytest.approx(one.stderr * scale, rel=1e-9)
    assert other.method == one.method == "exponential"


@pytest.mark.parametrize("losses", [[], [math.nan], [1.0, math.inf, 1.0, 1.0, 1.0], [1.0, 1.0, -math.inf]])
def test_a_series_that_is_not_finite_is_infinitely_bad(losses):
    result = forecast(range(len(losses)), losses, 100)
    assert (result.value, result.stderr, result.method) == (math.inf, math.inf, "diverged")


# -- nothing fools it --------------------------------------------------------------------------------------------------

NOISE = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).uniform(-1.0, 1.0, 16))
LEVEL = st.sampled_from([-1e6, -3.0, 0.0, 2.3, 1e4])  # a loss may lie anywhere: below 0, or far from it
PROBE_STEPS = np.arange(1, 17)


@st.composite
def good_series(draw):
    """A loss that falls from 1 above `LEVEL`, with noise of at most 5 % of the fall; (start, series)."""
    level, rate, noise = draw(LEVEL), draw(st.floats(0.05, 0.5)), draw(NOISE)
    fall = 1.0 - np.exp(-rate * PROBE_STEPS)
    return level + 1.0, level + 1.0 - 0.8 * fall + 0.04 * fall[-1] * noise


@st.composite
def explosion(draw, start):
    """A loss that leaps to up to 1e6 times the fall of a good one, and comes down again as fast as it likes, to no lower than
    half way to where a good one goes. It may leap before the first report."""
    peak, at, end = 10.0 ** draw(st.floats(0.5, 6.0)), draw(st.integers(-3, 14)), draw(st.floats(-0.4, 30.0))
    since = np.maximum(PROBE_STEPS - 1 - at, 0)
    down = end + (peak - end) * np.exp(-draw(st.floats(0.05, 3.0)) * since)
    return start + np.where(at > PROBE_STEPS - 1, -0.02 * PROBE_STEPS, down)


def forecast_of(start, losses, horizon=160):
    return forecast(PROBE_STEPS, losses, horizon, 0.0, start)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_an_explosion_earns_no_credit_and_never_beats_what_it_has_shown(data):
    start, _ = data.draw(good_series())
    losses = data.draw(explosion(start))
    found = forecast_of(start, losses)
    assert found.value == pytest.approx(tail_mean(losses), rel=1e-9, abs=1e-9) or np.max(
        losses
    ) - start < start - tail_mean(losses)
    assert found.value >= start - 2.0 * max(0.0, start - tail_mean(losses)) - 1e-6 * abs(start)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_of_a_good_probe_and_one_that_exploded_the_good_one_is_chosen(data):
    """Unless the one that exploded has come to lie below it: then it has shown what it can."""
    start, good = data.draw(good_series())
    bad = data.draw(explosion(start))
    if tail_mean(bad) > tail_mean(good):
        assert forecast_of(start, good).value < forecast_of(start, bad).value


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_where_nobody_knows_the_start_the_probes_of_the_stage_tell_it(data):
    """The first stage of a run: two of four probes explode, some before their first report."""
    start, good = data.draw(good_series())
    series = [good, good + 1e-3, data.draw(explosion(start)), data.draw(explosion(start))]
    probes = [
        Probe(
            lr=1.0,
            x=i / 4,
            status="done",
            first_loss=float(y[0]),
            loss=float(y[-1]),
            losses=y.tolist(),
            steps=[*PROBE_STEPS],
        )
        for i, y in enumerate(series)
    ]
    nowhere = Start(None, None, None)
    values = [judge(probe, probes, nowhere, 160, None).value for probe in probes]
    for i in (2, 3):
        if tail_mean(series[i]) > tail_mean(good) + 1e-3:
            assert values[i] > values[0]


SHAPES = {
    "rising": lambda noise: 0.1 * PROBE_STEPS + 0.2 * noise,
    "flat": lambda noise: 0.0 * noise,
    "noise about the start": lambda noise: noise,
    "oscillating": lambda noise: (-1.0) ** PROBE_STEPS * (1.0 + 0.5 * noise),
    "oscillating and growing": lambda noise: (-1.3) ** PROBE_STEPS * (1.0 + 0.2 * noise),
}


@settings(deadline=None, max_examples=50)
@given(NOISE, LEVEL, st.floats(-6.0, 6.0))
@pytest.mark.parametrize("shape", SHAPES)
def test_series_that_gain_nothing_are_credited_with_nothing(shape, noise, level, decades):
    scale = 10.0**decades
    losses = level + scale * SHAPES[shape](noise)
    found = forecast_of(level, losses)
    naive = tail_mean(losses)
    gained, lost = level - naive, np.max(losses) - level
    precision = 1e-9 * (abs(level) + scale)
    assert found.value == pytest.approx(naive, rel=1e-9, abs=precision) or gained >= lost - precision
    assert naive - max(0.0, gained) - precision <= found.value <= naive + precision


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 16), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_series_with_losses_that_are_not_finite_has_diverged_however_good_the_others_look(data, count, value):
    start, losses = data.draw(good_series())
    losses[data.draw(st.permutations(range(16)))[:count]] = value
    assert forecast_of(start, losses).method == "diverged"


@settings(deadline=None, max_examples=100)
@given(good_series(), st.sampled_from([-1e5, -1.0, 1.0, 1e5]))
def test_without_a_floor_the_zero_of_the_loss_does_not_matter(series, shift):
    start, losses = series
    one = forecast(PROBE_STEPS, losses, 160, None, start)
    other = forecast(PROBE_STEPS, losses + shift, 160, None, start + shift)
    assert other.method == one.method
    assert other.value - shift == pytest.approx(one.value, abs=1e-8 * (abs(start) + abs(shift)) + 1e-6)


def test_a_negative_loss_is_no_worse_forecast_for_the_floor_of_others():
    for level in (0.0, -0.5, -5.0, -1e4):
        losses = level + 3.0 * np.exp(-PROBE_STEPS / 8)
        assert forecast_of(level + 3.0, losses).value == pytest.approx(level, abs=0.15)


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_points_give_their_mean(n):
    losses = [3.0, 2.0, 1.0][:n]
    result = forecast(range(n), losses, 1000)
    assert result.value == pytest.approx(np.mean(losses))
    assert result.method == "mean"


@pytest.mark.parametrize(
    "losses", [[2.0] * 8, [0.0] * 8, [1.0 + 0.1 * i for i in range(8)], [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 2.9, 3.1]]
)
def test_flat_and_rising_series_are_not_extrapolated(losses):
    result = forecast(range(8), losses, 1000)
    assert result.value == pytest.approx(tail_mean(losses))
    assert result.method == "mean"


def test_all_reports_at_one_step_give_the_mean():
    assert forecast([5, 5, 5, 5], [4.0, 3.0, 2.0, 1.0], 100).value == pytest.approx(2.0)


def test_no_series_is_forecast_above_its_own_end_nor_below_the_floor():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(4, 30))
        losses = np.abs(np.cumsum(rng.standard_normal(n))) + rng.uniform(0, 1)
        result = forecast(range(1, n + 1), losses, 10 * n)
        assert 0.0 <= result.value <= tail_mean(losses) + 1e-12


def test_a_straight_line_down_is_not_followed_to_the_horizon():
    """Ten times the series' length on, it would be at -80."""
    losses = [10.0 - 0.5 * i for i in range(16)]
    naive, fall = tail_mean(losses), np.mean(losses[:8]) - tail_mean(losses)
    assert naive - 2.0 * fall - 1e-9 <= forecast(range(16), losses, 160, None).value < naive


def test_noise_alone_earns_little():
    rng = np.random.default_rng(0)
    credits = []
    for _ in range(200):
        losses = 1.0 + 0.1 * rng.standard_normal(16)
        credits.append(tail_mean(losses) - forecast(range(16), losses, 160).value)
    assert np.mean(credits) < 0.03


def test_a_metric_without_a_floor_may_fall_below_zero():
    t = np.arange(16)
    losses = np.exp(-0.1 * t) - 0.9
    free, bounded = forecast(t, losses, 100, None).value, forecast(t, losses + 0.9, 100, 0.0).value
    assert free == pytest.approx(-0.9, abs=0.05)
    assert bounded == pytest.approx(0.0, abs=0.05)


def test_the_tail_is_a_fifth_of_the_series_and_three_points_at_least():
    assert tail_mean(range(100)) == pytest.approx(89.5)
    assert tail_mean([1, 2, 3, 4, 5]) == 4.0
    assert tail_mean([1.0]) == 1.0


# -- accuracy where the model is true ----------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.5, 2.0])
@pytest.mark.parametrize("c", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("decay", [1.5, 3.0, 8.0])
def test_a_true_exponential_is_forecast_within_a_few_percent_of_its_fall(a, c, decay):
    """`decay` is -b in units of 1 / (length of the series)."""
    t = np.arange(1, 17) / 16
    for noise, allowed in ((0.0, 0.06), (0.01, 0.12)):
        rng = np.random.default_rng(0)
        series = a * np.exp(-decay * t) + c + noise * a * rng.standard_normal(16)
        truth = a * math.exp(-decay * 10) + c
        result = forecast(np.arange(1, 17), series, 160)
        assert abs(result.value - truth) <= allowed * a
        assert abs(result.value - truth) < abs(tail_mean(series) - truth) + 0.01 * a
        assert result.stderr <= 3.0 * noise * a + 0.02 * a


# -- the gate: real curves ---------------------------------------------------------------------------------------------


def _build(optimizer):
    def build():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        data = split()
        return TrainingTask(
            model=model, optimizer=optimizer(model.parameters()), loss=nn.functional.cross_entropy,
            train_data=data["train"], val_data=data["val"], batch_size=32,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def landscapes():
    """Real curves: per landscape, (n,) LRs' series of validation losses up to step 20 and the loss at step 200."""
    found = []
    tasks = (
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), np.geomspace(1e-3, 1.0, 9)),
        (lambda p: torch.optim.AdamW(p, lr=0.1), np.geomspace(1e-4, 1e-1, 9)),
    )
    for optimizer, lrs in tasks:
        for start in (0, 60):
            trainer = Trainer(_build(optimizer))
            trainer.train(start, lambda step, lr=float(lrs[5]): lr)
            checkpoint = copy.deepcopy(trainer.state_dict())
            curves = []
            for lr in lrs.tolist():
                trainer.load_state_dict(copy.deepcopy(checkpoint))
                series = []
                for i in range(1, POINTS + 1):
                    trainer.train(start + PROBE * i // POINTS, lambda step, lr=lr: lr)
                    series.append(trainer.evaluate()["loss"])
                trainer.train(start + TAU, lambda step, lr=lr: lr)
                curves.append(([PROBE * i // POINTS for i in range(1, POINTS + 1)], series, trainer.evaluate()["loss"]))
            found.append(curves)
    return found


def test_on_recorded_real_curves_it_is_nearer_than_the_mean_and_ranks_about_as_well(landscapes, record_property):
    """Measured: median error .43 against .61. As a ranking of LRs nothing has beaten the mean yet (regret 1.86, 1.69)."""
    failures, ours, naive, regrets = 0, [], [], {"forecast": [], "mean": []}
    for curves in landscapes:
        with warnings.catch_warnings(record=True) as caught:
            results = [forecast(steps, series, TAU) for steps, series, _ in curves]
        failures += len(caught) + sum(not math.isfinite(result.value) for result in results)
        truth = np.array([end for *_, end in curves])
        means = np.array([tail_mean(series) for _, series, _ in curves])
        values = np.array([result.value for result in results])
        ours += (np.abs(values - truth) / truth).tolist()
        naive += (np.abs(means - truth) / truth).tolist()
        for name, scores in (("forecast", values), ("mean", means)):
            regrets[name].append(truth[scores.argmin()] / truth.min() - 1.0)
    numbers = dict(
        curves=len(ours), failures=failures, error=np.median(ours), naive_error=np.median(naive),
        regret=np.mean(regrets["forecast"]), naive_regret=np.mean(regrets["mean"]),
    )  # fmt: skip
    for name, value in numbers.items():
        record_property(name, float(value))
    assert failures == 0
    assert numbers["error"] < 0.9 * numbers["naive_error"]
    assert numbers["regret"] < 1.25 * numbers["naive_regret"]
