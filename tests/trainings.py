"""A small net with batch norm and dropout on a task of two classes, and what compares two of its states."""

from __future__ import annotations

import torch
from torch import nn

from autolrs_ray.training.task import TrainingTask, accuracy

GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(80, 6, generator=GENERATOR)
Y = (X[:, 0] * X[:, 1] > 0).long()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)


def momentum(model):
    return sgd(model, momentum=0.9, nesterov=True, weight_decay=1e-3)


def noisy(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 2))


def task(optimizer=momentum, model=net, **options):
    network = model()
    defaults = dict(
        loss=nn.functional.cross_entropy, train_data=(X[:64], Y[:64]), val_data=(X[64:], Y[64:]), batch_size=10,
        metrics={"accuracy": accuracy},
    )  # fmt: skip
    return TrainingTask(model=network, optimizer=optimizer(network), **{**defaults, **options})


def flat(value):
    """Every tensor and number in a state, in order."""
    if isinstance(value, dict):
        return [item for key in value for item in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [item for entry in value for item in flat(entry)]
    return [value.to_dense() if isinstance(value, torch.Tensor) else value]


def assert_same(first, second):
    first, second = flat(first), flat(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, (a, b)


def falling(step):
    return 0.2 / (1 + step / 10)
