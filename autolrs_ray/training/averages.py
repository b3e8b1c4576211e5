"""Averages of weights over parts of the run so far."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autolrs_ray.core.policy import finite_or_inf


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest of `losses`, the first of equals; one that is not finite counts as the highest."""
    return min(range(len(losses)), key=lambda i: finite_or_inf(losses[i]))


def state_tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers of `model`: those that can be averaged, and the counters."""
    tensors = [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
