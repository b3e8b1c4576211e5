"""Batch-norm statistics over the batch of all processes: torch's own layer on accelerators, one of ours where there is none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # its gradient is summed over the processes too
from torch.nn.modules.batchnorm import _BatchNorm


class CPUSyncBatchNorm(_BatchNorm):
    """As torch's SyncBatchNorm, which has no kernels for the CPU. Processes may have different numbers of rows."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        over = [0, *range(2, input.dim())]
        count = torch.tensor(float(input.numel() // input.shape[1]), dtype=input.dtype)
        dist.all_reduce(count)
        shape = [1, -1, *[1] * (input.dim() - 2)]
        mean = all_reduce(input.sum(over)) / count  # type: ignore[no-untyped-call]
        centred = input - mean.view(shape)
        variance = all_reduce((centred * centred).sum(over)) / count  # type: ignore[no-untyped-call]
        if self.training and self.track_running_stats:
            self._note(mean.detach(), variance.detach() * count / (count - 1.0))
        found = centred * torch.rsqrt(variance + self.eps).view(shape)
        return found if self.weight is None else found * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch norm over the batch of all processes. Parameters and buffers stay the ones they are."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return,no-untyped-call]
    if isinstance(model, _BatchNorm) and not isinstance(model, CPUSyncBatchNorm):
        layer = CPUSyncBatchNorm(model.num_features, model.eps, model.momentum, False, model.track_running_stats)
        layer.affine, layer.training = model.affine, model.training
        layer._parameters, layer._buffers = model._parameters, model._buffers
        return layer
    for name, child in model.named_children():
        setattr(model, name, synchronised(child, device))
    return model
