"""Means of a loss and of metrics over batches, in the model's own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from autolrs_ray.training.batches import Batch, on_tensors
from autolrs_ray.training.precision import HALF


@torch.no_grad()
def weighted_sums(
    forward: Callable[[Any], Any],
    functions: Mapping[str, Callable[[Any, Any], Any]],
    batches: Iterable[tuple[Batch, int]],
    autocast: Callable[[], AbstractContextManager[Any]] | None,
) -> dict[str, float]:
    """For every function of (output, targets) the sum over `batches` of its value times the batch's number of rows.

    Values are summed in float32, those of float64 in float64. Under `autocast` half outputs become float32 first.
    """
    sums: dict[str, Any] = dict.fromkeys(functions, 0.0)
    for (inputs, targets), count in batches:
        if autocast is None:
            output = forward(inputs)
        else:
            with autocast():
                output = forward(inputs)
            output = on_tensors(_wide, output)
        for name, function in functions.items():
            value = function(output, targets)
            sums[name] = sums[name] + (_wide(value.detach()) if isinstance(value, Tensor) else value) * count
    return {name: float(value) for name, value in sums.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
