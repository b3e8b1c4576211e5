"""The gradients of a loss: whether there are any, and their norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def checked_loss(loss: Any) -> Tensor:
    """`loss`, a scalar that depends on what is trained. Raises TypeError or ValueError where it is something else."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss must be a scalar tensor, the mean over the batch, got a {type(loss).__name__}: return the tensor "
            "itself, not its .item() and not a dict or tuple of several"
        )
    if loss.dim():
        raise ValueError(
            f"the loss must be a scalar, the mean over the batch, got a tensor of shape {tuple(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on anything that is trained: all parameters are frozen (requires_grad=False), or the "
            "graph is cut on the way (detach, .data, .item, NumPy, torch.no_grad, argmax)"
        )
    return loss


def clip(parameters: Sequence[Tensor], most: float) -> None:
    """As torch's clip_grad_norm_, with gradients that are sparse (of embeddings) among them."""
    if not any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        nn.utils.clip_grad_norm_(parameters, most)
        return
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    share = (most / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)  # torch's own
    for value in values:
        value.mul_(share.to(value.device))


def first_weights(parameters: Sequence[Tensor]) -> Tensor:
    """The first number of each of `parameters`, on the CPU: any rule that updates weights moves them."""
    found = [parameter.detach()[(0,) * parameter.dim()] for parameter in parameters if parameter.numel()]
    wide = [(torch.view_as_real(value).sum() if value.is_complex() else value).double() for value in found]
    return torch.stack(wide).cpu() if wide else torch.empty(0)
