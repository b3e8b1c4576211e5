"""What is trained: a model, its optimizer, its loss and its data, as the user's build function returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from autolrs_ray.core.checks import require_float
from autolrs_ray.training.averages import require_parts

Batch = tuple[Tensor, Tensor]
Data = tuple[Tensor, Tensor] | Dataset[Any]
"""(inputs, targets) tensors with the same first dimension, or a map-style dataset of (input, target) pairs."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of rows of `output` (n, classes) whose largest entry is at `target` (n,)."""
    return (output.argmax(1) == target).float().mean()


@dataclass
class TrainingTask:
    """What is trained: built once per process by the user's function.

    loss: (model output, target) -> scalar mean over the batch. metrics: further (output, target) -> scalar mean,
    reported on the validation data as "val_NAME". augment: (inputs, generator) -> inputs, on the device.
    autocast: run forward passes in bfloat16. compile: True, or a mode of torch.compile ("reduce-overhead": CUDA graphs).
    val_data must not be the test set: learning rates are chosen on it. val_fraction: the part of its rows, in (0, 1], that
    reports are taken on: the same ones, drawn by the run's seed, in every trial.
    average_over: where weights are averaged, one average for each part of the run so far, in (0, 1]: 0.25 spans about its
    last quarter, 1.0 all of it. The one that is best on the validation data counts. Each costs the memory of the weights,
    and a validation pass a report.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    train_data: Data
    val_data: Data
    batch_size: int
    eval_batch_size: int = 1024
    val_fraction: float = 1.0
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    clip_norm: float | None = None
    average_over: tuple[float, ...] = (0.25, 0.5, 1.0)
    autocast: bool = False
    channels_last: bool = False
    compile: bool | str = False
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= length(self.train_data):
            raise ValueError(f"batch_size must be in [1, {length(self.train_data)}], got {self.batch_size}")
        if length(self.val_data) < 1:
            raise ValueError("val_data is empty: learning rates are chosen on it; hold out a part of the training data")
        require_float("val_fraction", self.val_fraction, 0.0, 1.0, low_open=True)
        self.average_over = require_parts("average_over", self.average_over)


def length(data: Data) -> int:
    return len(data[0]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]


def chosen(data: Data, rows: Tensor) -> Data:
    return (data[0][rows], data[1][rows]) if isinstance(data, tuple) else Subset(data, rows.tolist())
