"""scikit-learn's digits (1,797 real 8 x 8 images) and a small convolutional net: the task of the quick experiments."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from autolrs_ray.training.task import TrainingTask, accuracy


def split() -> dict[str, tuple[Tensor, Tensor]]:
    """1,000 training, 297 validation and 500 test images, always the same."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split([1000, 297, 500]), strict=True))
    return {name: (images[rows], labels[rows]) for name, rows in parts.items()}


def build(config: dict[str, Any]) -> TrainingTask:
    """SGD with momentum 0.9, batch size 32, three convolutions with batch norm; 11,000 parameters."""
    width = config.get("width", 16)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )
    data = split()
    return TrainingTask(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        loss=nn.functional.cross_entropy,
        train_data=data["train"],
        val_data=data["val"],
        batch_size=32,
        metrics={"accuracy": accuracy},
    )
