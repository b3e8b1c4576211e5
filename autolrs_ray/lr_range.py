"""The learning rate (LR) range test of Smith (2017, "Cyclical Learning Rates for Training Neural Networks")."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autolrs_ray.core.checks import require_float, require_int, validate_interval
from autolrs_ray.training.optimizers import lr_ratios, needs_closure, train_mode, write_lr

SMOOTHING = 0.9  # of the exponential moving average of the losses
FALL = 0.05  # of the whole fall of the smoothed loss: where it counts as falling
NOTHING = 1e-3  # of the level at the start: a fall of less is none


@dataclass(frozen=True)
class LRRange:
    """What a range test saw: `lrs[i]` was used for the update after which a batch's loss was `losses[i + 1]`.

    lrs, losses: one of each per step, finite; `smoothed` is the bias-corrected moving average of the losses. suggestion: the
    LR at which the smoothed loss falls fastest. interval: from the LR at which it begins to fall to the last one at which it
    is below its level at the start; for `lr_interval`. Both None if the loss never fell by more than its noise.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    interval: tuple[float, float] | None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib Figure of loss over LR, written to `path` (its suffix names the format) if that is given."""
        from autolrs_ray.show.style import LR, legend_below, new_figure, plain_log, style

        with style():
            figure = new_figure()
            axes = figure.add_subplot()
            axes.plot(self.lrs, self.losses, color="0.7", linewidth=1, label="loss of a batch")
            axes.plot(self.lrs, self.smoothed, label="smoothed")
            if self.interval is not None and self.suggestion is not None:
                axes.axvspan(*self.interval, color="C2", alpha=0.12, label="interval")
                axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"suggestion, {self.suggestion:.2g}")
            axes.set_xscale("log")
            plain_log(axes.xaxis)
            low, high = min(self.smoothed), max(self.losses[0], self.smoothed[0])
            axes.set_ylim(low - 0.1 * (high - low) - 1e-12, high + 0.5 * (high - low) + 1e-12)
            axes.set(xlabel=LR, ylabel="training loss", title="LR range test")
            legend_below(figure)
            if path is not None:
                figure.savefig(path)
        return figure


def lr_range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr_interval: tuple[float, float] = (1e-7, 10.0),
    steps: int = 100,
    stop_factor: float = 4.0,
) -> LRRange:
    """Train `steps` optimizer steps while the LR rises from lr_interval[0] to lr_interval[1] in equal ratios.

    loss: (model output, target) -> scalar. batches: (inputs, target) on the model's device; begun anew when they run out.
    Parameter groups keep the ratios of their LRs. The test ends early where the loss is not finite, or its moving average is
    above `stop_factor` times its least value so far (and above its start).

    Afterwards, also after an exception, the model (with all its buffers), its mode and gradients, the optimizer and the random
    numbers of torch, NumPy, Python and the DataLoader's own generator are as they were. A range test sees a hundred steps:
    what it suggests is where losses fall at first, not what trains best.

    Raises ValueError for options out of range or batches that are empty, and whatever model, loss and batches raise.
    """
    low, high = validate_interval(lr_interval)
    require_int("steps", steps, 10)
    require_float("stop_factor", stop_factor, 1.0, math.inf, low_open=True)
    if needs_closure(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} computes the loss several times a step, which this test does not do"
        )
    lr_ratios([group["lr"] for group in optimizer.param_groups])
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    losses: list[float] = []
    average = _MovingAverage()
    with _put_back(model, optimizer), _random_numbers_put_back(batches):
        model.train()
        train_mode([optimizer])
        for lr, (inputs, target) in zip(lrs, _endless(batches), strict=False):
            write_lr(optimizer.param_groups, lr)
            optimizer.zero_grad(set_to_none=True)
            value = loss(model(inputs), target)
            if not math.isfinite(value.item()):
                break
            losses.append(value.item())
            average.add(losses[-1])
            if average.diverged(stop_factor):
                break
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return _summary(lrs[: len(losses)], losses, average.values)


def _endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            yield batch
        if count == 0:
            raise ValueError("batches ran out and cannot be begun anew: pass a list or a DataLoader, not a generator")


@contextmanager
def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Model and optimizer as they were, afterwards: also the buffers that no state_dict holds."""
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode, named in modules:
            module.training = mode
            module._buffers.update(named)  # where forward assigned another tensor
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _random_numbers_put_back(batches: object) -> Iterator[None]:
    """The generators that a step may draw from as they were, afterwards; `batches` may be a DataLoader with its own."""
    python, numpy = random.getstate(), np.random.get_state()
    sources = (batches, getattr(batches, "sampler", None))
    own = {getattr(source, "generator", None) for source in sources}
    states = [(generator, generator.get_state()) for generator in own if isinstance(generator, torch.Generator)]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in states:
                generator.set_state(state)


class _MovingAverage:
    """Bias-corrected exponential moving average of losses, taken in one by one; `values` has one for each of them."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._biased, self._least = 0.0, math.inf

    def add(self, loss: float) -> None:
        self._biased = SMOOTHING * self._biased + (1.0 - SMOOTHING) * loss
        self.values.append(self._biased / (1.0 - SMOOTHING ** (len(self.values) + 1)))
        self._least = min(self._least, self.values[-1])

    def diverged(self, stop_factor: float) -> bool:
        """True where the last value is above the first and above `stop_factor` times the least."""
        return self.values[-1] > max(self.values[0], self._least + (stop_factor - 1.0) * abs(self._least))


def _summary(lrs: list[float], losses: list[float], smoothed: list[float]) -> LRRange:
    """The suggestion and the interval that `losses` and their moving average give."""
    least = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    early = losses[: max(5, len(losses) // 10)]  # at LRs that hardly move the weights: the level and the noise to beat
    level, noise = (fmean(early), pstdev(early)) if early else (0.0, 0.0)
    suggestion, interval = None, None
    if least > 0 and level - smoothed[least] > max(NOTHING * abs(level), noise):
        threshold = level - FALL * (level - smoothed[least])
        onset = max((i for i in range(least) if smoothed[i] > threshold), default=0)
        steepest = min(range(onset, least), key=lambda i: smoothed[i + 1] - smoothed[i])
        top = max(i for i in range(least, len(smoothed)) if smoothed[i] < level)
        suggestion, interval = lrs[steepest], (lrs[onset], lrs[top])
    if interval is not None and not interval[0] < interval[1]:
        interval = None
    return LRRange(tuple(lrs), tuple(losses), tuple(smoothed), suggestion, interval)
