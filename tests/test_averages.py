"""WeightAverages: the plain formula in enough precision, whatever a model is made of; the model's own weights come back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autolrs_ray import WeightAverages
from autolrs_ray.training.averages import lowest

PARTS = (0.25, 0.5, 1.0)


def trained(averages: WeightAverages, steps: range, scale: float = 0.1) -> list[dict[str, Tensor]]:
    """Move every trained weight of the model at random, `steps` times; the weights after each, in float64 or complex128."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in averages.model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((scale * noise).to(parameter.dtype))
        averages.update(step)
        wide = torch.complex128 if any(p.is_complex() for p in averages.model.parameters()) else torch.float64
        history.append({name: p.detach().to(wide).clone() for name, p in averages.model.named_parameters()})
    return history


def reference(history: list[dict[str, Tensor]], part: float) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for step, weights in enumerate(history, 1):
        for name, value in weights.items():
            old = found.get(name, value)
            found[name] = old + min(1.0, 1.0 / (part * step)) * (value - old)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_averages_follow_the_formula_in_float32_or_the_weights_own_precision(dtype: torch.dtype) -> None:
    averages = WeightAverages(nn.Linear(5, 3, dtype=dtype))
    history = trained(averages, range(1, 41))
    precision = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    for part, kept in zip(PARTS, averages.state_dict()["weights"], strict=True):
        for name, expected in reference(history, part).items():
            # each of 40 updates rounds a value below 2 a few times
            torch.testing.assert_close(kept[name].to(expected.dtype), expected, rtol=0, atol=40 * 4 * 2 * precision)


def test_averages_of_bfloat16_weights_do_not_stand_still() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    averages = WeightAverages(model, (1.0,))
    for step in range(1, 2001):
        with torch.no_grad():
            model.weight.fill_(1.0 + (step > 1000))
        averages.update(step)
    assert averages.state_dict()["weights"][0]["weight"].item() == pytest.approx(1.5, abs=2000 * 2**-23)


class Mixed(nn.Module):
    """Tied weights, a mask of -inf, a counter, batch norm, a frozen part, and a buffer that forward assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.frozen = nn.Embedding(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.full((6, 6), -math.inf).triu(1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1.0
        return self.head(self.frozen(self.norm(self.embed(x))) @ self.mask.exp())


def test_masks_counters_tied_and_frozen_weights_and_statistics() -> None:
    model = Mixed()
    averages = WeightAverages(model, (1.0,))
    weights, means = [], []
    for step in range(1, 6):
        model(torch.randint(0, 7, (32,), generator=torch.Generator().manual_seed(step)))
        with torch.no_grad():
            model.embed.weight.add_(0.1)
        averages.update(step)
        weights.append(model.embed.weight.detach().double())
        means.append(model.norm.running_mean.double())
    names = set(averages.state_dict()["weights"][0])
    assert names == {
        "embed.weight",
        "head.weight",
        *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    }
    before = copy.deepcopy(model.state_dict())
    with averages.applied(0):
        assert model.head.weight is model.embed.weight
        torch.testing.assert_close(model.embed.weight.double(), sum(weights) / 5, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.norm.running_mean.double(), sum(means) / 5, rtol=1e-6, atol=1e-6)
        assert model.seen == 5.0  # the model's own, however it was assigned
        assert model.eval()(torch.arange(7)).isfinite().all()
        assert model.seen == 6.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.frozen.requires_grad_(True)
    averages.update(6)
    assert "frozen.weight" in averages.state_dict()["weights"][0]


def test_the_models_own_weights_come_back_whatever_happens() -> None:
    model = nn.Linear(4, 4)
    averages = WeightAverages(model)
    trained(averages, range(1, 9))
    before = model.weight.detach().clone()

    def breaks() -> float:
        assert not torch.equal(model.weight, before)
        raise RuntimeError("no validation data")

    with pytest.raises(RuntimeError, match="no validation data"):
        averages.evaluate(breaks)
    assert torch.equal(model.weight, before)


def test_the_best_average_is_reported_under_the_names_of_the_pair_and_applied() -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = WeightAverages(model)
    with pytest.raises(ValueError, match="which average is best is not known"), averages.applied():
        pass
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.fill_(float(step))
        averages.update(step)
    values = averages.each(lambda: model.weight.item())
    assert values[2] == pytest.approx(4.5)
    assert values == sorted(values, reverse=True)
    assert averages.evaluate(lambda: model.weight.item()) == {"averaged_loss": values[2]}
    assert averages.best == 2
    found = averages.evaluate(lambda: {"val_accuracy": model.weight.item(), "val_loss": 3.0}, "val_accuracy", "max")
    assert found == {"averaged_accuracy": values[0], "averaged_loss": 3.0}
    with averages.applied():
        assert model.weight.item() == values[0]
    averages.update(9)
    assert averages.best is None


def test_saved_and_loaded_averages_go_on_as_if_nothing_had_happened() -> None:
    def make() -> WeightAverages:
        torch.manual_seed(0)
        return WeightAverages(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))

    whole, first, second = make(), make(), make()
    trained(whole, range(1, 31))
    trained(first, range(1, 13))
    first.judged(1)
    trained(second, range(1, 3))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.best == 1
    trained(second, range(13, 31))
    for ours, theirs in zip(second.state_dict()["weights"], whole.state_dict()["weights"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_updates_at_some_steps_only_weigh_as_much_as_the_steps_they_stand_for() -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = WeightAverages(model, (1.0,))
    for step in (5, 10, 20):
        with torch.no_grad():
            model.weight.fill_(float(step))
        averages.update(step)
    expected = 0.5 * (5 + 0.5 * (10 - 5)) + 0.5 * 20
    assert averages.state_dict()["weights"][0]["weight"].item() == expected


def test_an_average_that_is_not_finite_though_the_weights_are_is_said_once(caplog: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = WeightAverages(model)
    for step, value in enumerate((1.0, math.inf, 1.0), 1):
        with torch.no_grad():
            model.weight.fill_(value)
        averages.update(step)
    for _ in range(2):
        averages.evaluate(lambda: model.weight.item())
    assert averages.trouble is not None
    assert [record.message for record in caplog.records] == [averages.trouble]
    assert "is not finite at step 3 in 'weight'" in averages.trouble


def test_wrong_steps_states_and_parts_are_refused() -> None:
    averages = WeightAverages(nn.Linear(2, 2))
    averages.update(4)
    with pytest.raises(ValueError, match="have seen step 4, got 4: update them once after every"):
        averages.update(4)
    with pytest.raises(ValueError, match=r"holds averages over .1.0,. of the run, over=.0.25, 0.5, 1.0. is asked for"):
        averages.load_state_dict(WeightAverages(averages.model, [1.0]).state_dict())
    with pytest.raises(ValueError, match=r"of another model: see 0\.bias, 0\.weight"):
        averages.load_state_dict(WeightAverages(nn.Sequential(nn.Linear(2, 2))).state_dict())
    with pytest.raises(ValueError, match="of another model: see weight"):
        averages.load_state_dict(WeightAverages(nn.Linear(3, 2)).state_dict())
    with pytest.raises(ValueError, match='mode must be "min" or "max"'):
        averages.evaluate(lambda: 1.0, mode="least")
    with pytest.raises(ValueError, match=r"compared by 'val_loss', which is none of \['val_error'\]"):
        averages.evaluate(lambda: {"val_error": 1.0})
    with pytest.raises(ValueError, match="different parts of the run"):
        WeightAverages(nn.Linear(2, 2), ())


def test_a_loss_that_is_not_finite_is_never_the_lowest() -> None:
    assert lowest([math.nan, 2.0, math.inf, 1.0, 1.0, -math.inf]) == 3
    assert lowest([math.nan, math.inf]) == 0
