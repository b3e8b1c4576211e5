"""A torch task of milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autolrs_ray.training.task import TrainingTask, accuracy


def build_tiny(config: dict[str, Any]) -> TrainingTask:
    """Two layers on 256 points of a fixed synthetic problem, with dropout so that random numbers matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] + 0.3 * torch.randn(320, generator=generator) > 0).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    return TrainingTask(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=nn.functional.cross_entropy,
        train_data=(x[:256], y[:256]),
        val_data=(x[256:], y[256:]),
        batch_size=32,
        metrics={"accuracy": accuracy},
    )
