"""The LR range test: it finds the range of a problem whose range is known, and leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autolrs_ray import lr_range_test
from tests.doc_blocks import blocks

Batch = tuple[Tensor, Tensor]


def quadratic() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor], list[Batch]]:
    """0.5 * w^2 per weight, curvature 1: gradient descent diverges above LR 2, and hardly moves below .001."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.ones(4, 1), torch.zeros(4, 1))]
    return model, optimizer, lambda output, target: 0.5 * (output - target).square().mean(), batches


class Restless(nn.Module):
    """Draws from every global generator, and keeps two buffers outside its state_dict: one written to, one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        return x * (1.0 + 0.01 * random.random() + 0.01 * np.random.rand())


def network() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor], list[Batch]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1), Restless())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
    return model, optimizer, nn.functional.mse_loss, batches


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    states = [model.state_dict(), optimizer.state_dict(), list(model.buffers()), torch.get_rng_state()]
    torch.save(copy.deepcopy([states, modes, gradients]), buffer)
    return buffer.getvalue() + pickle.dumps([random.getstate(), np.random.get_state()])


def test_a_quadratic_has_its_known_range() -> None:
    seen = lr_range_test(*quadratic(), lr_interval=(1e-6, 1e3), steps=200)
    assert seen.suggestion is not None
    assert seen.interval is not None
    assert 1e-2 < seen.suggestion < 2.0
    assert 1e-4 < seen.interval[0] < seen.suggestion < seen.interval[1]
    assert 1.0 < seen.interval[1] < 30.0
    assert seen.lrs[-1] < 1e3  # it stopped once the loss had blown up
    ratios = [after / before for before, after in zip(seen.lrs, seen.lrs[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_the_first_losses_are_those_of_gradient_descent() -> None:
    seen = lr_range_test(*quadratic(), lr_interval=(0.1, 0.2), steps=11)
    weight, expected = 1.0, []
    for lr in seen.lrs:
        expected.append(0.5 * weight**2)
        weight -= lr * weight
    assert seen.losses == pytest.approx(expected, rel=1e-5)
    assert len(seen.lrs) == len(seen.losses) == len(seen.smoothed) == 11
    assert (seen.lrs[0], seen.lrs[-1]) == pytest.approx((0.1, 0.2))


def test_the_smoothed_losses_are_weighted_means_of_all_losses_so_far() -> None:
    seen = lr_range_test(*quadratic(), lr_interval=(1e-3, 1.0), steps=50)
    for i, smoothed in enumerate(seen.smoothed):
        weights = [0.9 ** (i - j) for j in range(i + 1)]
        mean = sum(weight * loss for weight, loss in zip(weights, seen.losses, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(mean)


@pytest.mark.parametrize("trained", [False, True])
def test_everything_is_put_back(trained: bool) -> None:
    model, optimizer, loss, batches = network()
    if trained:  # the optimizer has moments, and gradients are there
        loss(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
    model[1].eval()
    before = snapshot(model, optimizer)
    seen = lr_range_test(model, optimizer, loss, batches)
    assert len(seen.lrs) > 10
    assert snapshot(model, optimizer) == before


def test_everything_is_put_back_after_an_exception() -> None:
    model, optimizer, loss, batches = network()
    calls = 0

    def failing(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("out of memory")
        return loss(output, target)

    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        lr_range_test(model, optimizer, failing, batches)
    assert calls == 7
    assert snapshot(model, optimizer) == before


def test_a_loader_with_a_generator_of_its_own_gives_the_batches_that_it_would_have_given() -> None:
    model, optimizer, loss, batches = network()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def first_batch(tested: bool) -> Tensor:
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
        if tested:
            lr_range_test(model, optimizer, loss, loader)
        return next(iter(loader))[0]

    assert torch.equal(first_batch(True), first_batch(False))


def test_groups_keep_their_ratios() -> None:
    used: list[tuple[float, float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            used.append((self.param_groups[0]["lr"], self.param_groups[1]["lr"]))

    layers = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.Sequential(*layers)
    optimizer = Watched(
        [{"params": layers[0].parameters(), "lr": 0.1}, {"params": layers[1].parameters(), "lr": 0.05}], lr=1
    )
    seen = lr_range_test(model, optimizer, nn.functional.mse_loss, [(torch.ones(2, 1), torch.ones(2, 1))], steps=10)
    assert [first for first, _ in used] == pytest.approx(seen.lrs)
    assert [second for _, second in used] == pytest.approx([lr / 2 for lr in seen.lrs])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_a_loss_that_never_falls_gives_no_suggestion_and_nan_ends_the_test() -> None:
    model, optimizer, _, batches = quadratic()
    still = lr_range_test(*quadratic(), lr_interval=(1e-9, 1e-8))
    flat = lr_range_test(model, optimizer, lambda output, target: 0.0 * output.sum() + 1.0, batches)
    assert (still.suggestion, still.interval) == (None, None)
    assert (flat.suggestion, flat.interval) == (None, None)
    nan = lr_range_test(model, optimizer, lambda output, target: output.sum() * float("nan"), batches)
    assert (nan.lrs, nan.losses, nan.suggestion) == ((), (), None)


def test_bad_options_are_refused() -> None:
    parts = quadratic()
    with pytest.raises(ValueError, match="steps must be at least 10, got 5"):
        lr_range_test(*parts, steps=5)
    with pytest.raises(ValueError, match="stop_factor"):
        lr_range_test(*parts, stop_factor=1.0)
    with pytest.raises(ValueError, match=r"0\.1"):
        lr_range_test(*parts, lr_interval=(0.1, 0.01))
    model, optimizer, loss, batches = parts

    def generator() -> Iterator[Batch]:
        yield from batches

    with pytest.raises(ValueError, match="cannot be begun anew: pass a list or a DataLoader"):
        lr_range_test(model, optimizer, loss, generator())


def test_the_documented_example_runs(tmp_path: Path) -> None:
    (block,) = blocks("A narrower interval: the LR range test")
    for seed in range(5):  # the first batches are noisy, and at those LRs nothing happens
        torch.manual_seed(seed)
        namespace: dict[str, Any] = {"STORAGE": str(tmp_path)}
        exec(block, namespace)
        low, high = namespace["seen"].interval
        assert 1e-4 < low <= namespace["seen"].suggestion < high
        assert 0.1 < high < 10.0
    assert (tmp_path / "range.png").exists()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_it_draws_itself(tmp_path: Path, suffix: str) -> None:
    seen = lr_range_test(*quadratic(), lr_interval=(1e-6, 1e3), steps=200)
    figure = seen.plot(tmp_path / f"range.{suffix}")
    assert (tmp_path / f"range.{suffix}").stat().st_size > 1000
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert list(axes.lines[1].get_ydata()) == list(seen.smoothed)
    assert f"suggestion, {seen.suggestion:.2g}" in axes.get_legend_handles_labels()[1]
