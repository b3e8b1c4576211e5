"""Kinds of small training for whole fields of learning rates: chosen to be awkward, on data that scikit-learn ships or that are
drawn from a seed. Each is built in milliseconds and trained to T in about a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional

from autolrs_ray.training.task import TrainingTask, accuracy

SGD, ADAM = (1e-5, 10.0), (1e-6, 1.0)
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """steps: T. interval: of the learning rates, six decades. raw: nothing is normalised; an untrained model is far worse than
    the best constant prediction."""

    build: Callable[[int], TrainingTask]
    steps: int
    interval: tuple[float, float] = SGD
    raw: bool = False


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


# -- data --------------------------------------------------------------------------------------------------------------


@cache
def digits() -> Part:
    data = load_digits()
    return torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)


@cache
def diabetes() -> Part:
    data = load_diabetes()
    return torch.tensor(data.data).float() * 20, torch.tensor(data.target).float()[:, None]


@cache
def cancer() -> Part:
    data = load_breast_cancer()
    rows = torch.tensor(data.data).float()
    return (rows - rows.mean(0)) / rows.std(0), torch.tensor(data.target)


@cache
def raw_table(load: Callable[[], Any]) -> Part:
    """The numbers as they come, from thousandths to thousands."""
    data = load()
    return torch.tensor(data.data).float(), torch.tensor(data.target)


@cache
def housing() -> Part:
    """Prices by income, age, rooms, population, latitude and longitude, each in its own unit."""
    generator = torch.Generator().manual_seed(0)
    low, width = torch.tensor([0.0, 0.0, 1.0, 0.0, 32.0, -124.0]), torch.tensor([10.0, 50.0, 8.0, 5000.0, 10.0, 10.0])
    rows = low + width * torch.rand(3000, 6, generator=generator)
    price = 0.4 * rows[:, 0] + 0.01 * rows[:, 1] - 1e-4 * rows[:, 3] + 0.3 * rows[:, 4].sin()
    return rows, (price + 0.05 * rows[:, 0] * torch.randn(3000, generator=generator))[:, None]


@cache
def shares() -> Part:
    """Images whose pixels add up to one."""
    images, labels = digits()
    return images / images.sum((1, 2, 3), keepdim=True), labels


def split(data: Part, seed: int, train: int, val: int) -> tuple[Part, Part]:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train : train + val]
    return (data[0][first], data[1][first]), (data[0][second], data[1][second])


def relabelled(data: Part, share: float) -> Part:
    """A `share` of the labels drawn anew."""
    generator = torch.Generator().manual_seed(11)
    hit = torch.rand(len(data[1]), generator=generator) < share
    return data[0], torch.where(hit, torch.randint(0, 10, data[1].shape, generator=generator), data[1])


@cache
def addition(length: int = 24) -> Part:
    """Sequences of numbers, two of them marked: their sum is asked for."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(2400, length, generator=generator)
    marks = torch.zeros(2400, length)
    for half in (0, 1):
        at = torch.randint(0, length // 2, (2400,), generator=generator) + half * length // 2
        marks[torch.arange(2400), at] = 1.0
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)


@cache
def rings() -> Part:
    """Points of the plane on two noisy rings; the targets are not used."""
    generator = torch.Generator().manual_seed(5)
    angle = 2 * math.pi * torch.rand(3000, generator=generator)
    radius = 1.0 + (torch.rand(3000, generator=generator) < 0.5).float()
    points = torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]
    return points + 0.03 * torch.randn(3000, 2, generator=generator), torch.zeros(3000)


@cache
def heavy_tails() -> Part:
    """A smooth function of eight numbers, with noise whose outliers are a hundred times as large as its middle."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(2600, 8, generator=generator)
    noise = torch.distributions.StudentT(2.0)
    torch.manual_seed(8)
    return rows, (rows[:, :1] * rows[:, 1:2]).sin() + rows[:, 2:3] + 0.3 * noise.sample((2600, 1))


# -- models and losses -------------------------------------------------------------------------------------------------


def mlp(width: int, depth: int, inputs: int = 64, outputs: int = 10, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    sizes = [inputs, *[width] * depth]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), act())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], outputs))


def convnet(norm: bool) -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]

    return nn.Sequential(*block(1, 12), *block(12, 24), nn.Flatten(), nn.Linear(96, 10))


class Recurrent(nn.Module):
    """The last state of an RNN, read out."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.rnn = kind(inputs, width, batch_first=True)  # type: ignore[call-arg]
        self.read = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.rnn(x.flatten(2) if x.dim() == 3 else x[:, 0])[0][:, -1])  # type: ignore[no-any-return]


class Couplings(nn.Module):
    """A normalising flow of affine couplings in the plane: x -> the negative log-likelihood of every row."""

    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(width, 2, 1, 2, nn.Tanh) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        log_det = x.new_zeros(len(x))
        for i, net in enumerate(self.nets):
            fixed, moved = x[:, i % 2 : i % 2 + 1], x[:, 1 - i % 2 : 2 - i % 2]
            scale, shift = net(fixed).chunk(2, 1)
            moved = moved * scale.tanh().exp() + shift
            log_det = log_det + scale.tanh()[:, 0]
            x = torch.cat([fixed, moved] if i % 2 == 0 else [moved, fixed], 1)
        return 0.5 * (x * x).sum(1) + math.log(2 * math.pi) - log_det  # type: ignore[no-any-return]


class Twins(nn.Module):
    """Embeddings of two noisy copies of an image, for a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 2, 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        copies = [functional.normalize(self.net(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2)]
        return copies[0] @ copies[1].T / 0.2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversaries(nn.Module):
    """Features from which the digit is to be read, and must not be whether it is upside down: a game of two."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.digit, self.turned = mlp(64, 1, 64, 32), nn.Linear(32, 10), mlp(32, 1, 32, 2)

    def forward(self, x: Tensor) -> Tensor:
        upside_down = torch.arange(len(x)) % 2 == 1
        h = self.features(torch.where(upside_down[:, None, None, None], x.flip(2), x)).relu()
        return torch.cat([self.digit(h), self.turned(Reversed.apply(h))], 1)  # type: ignore[no-untyped-call]


def of_both(output: Tensor, target: Tensor) -> Tensor:
    turned = torch.arange(len(target)) % 2
    return functional.cross_entropy(output[:, :10], target) + functional.cross_entropy(output[:, 10:], turned)


class Codebook(nn.Module):
    """A vector-quantised autoencoder: the output holds what is decoded, and what the codes are off by."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(64, 1, 64, 8), mlp(64, 1, 8, 64)
        self.codes = nn.Parameter(0.3 * torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = self.codes[torch.cdist(z, self.codes).argmin(1)]
        off = ((nearest - z.detach()) ** 2).mean(1) + 0.25 * ((z - nearest.detach()) ** 2).mean(1)
        return torch.cat([self.decode(z + (nearest - z).detach()), off[:, None]], 1)


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    return ((output[:, :64] - target) ** 2).mean() + output[:, 64].mean()


def matching(output: Tensor, target: Tensor) -> Tensor:
    rows = torch.arange(len(output))
    return 0.5 * (functional.cross_entropy(output, rows) + functional.cross_entropy(output.T, rows))


def mean(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


def shifted(by: float, times: float, output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in other units, from another zero."""
    return times * functional.cross_entropy(output, target) + by


def spiky(output: Tensor, target: Tensor) -> Tensor:
    """The fourth power of the error: now and then one row is the whole loss."""
    return ((output - target) ** 4).mean()


# -- the list ----------------------------------------------------------------------------------------------------------


def classify(
    model: Callable[[], nn.Module],
    steps: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    rows: tuple[int, int] = (1000, 397),
    batch: int = 32,
    noise: float = 0.0,
    scale: float = 1.0,
    **options: Any,
) -> Kind:
    def build(seed: int) -> TrainingTask:
        data = relabelled(digits(), noise) if noise else digits()
        train, val = split((scale * data[0], data[1]), seed, *rows)
        net = model()
        metrics = {} if loss in (of_both, matching) else {"accuracy": accuracy}
        return TrainingTask(net, optimizer(net), loss, train, val, batch, metrics=metrics, **options)

    return Kind(build, steps, ADAM if optimizer is adam else SGD)


def on(
    data: Callable[[], Part],
    model: Callable[[], nn.Module],
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    rows: tuple[int, int],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    batch: int = 32,
    interval: tuple[float, float] | None = None,
    **options: Any,
) -> Kind:
    def build(seed: int) -> TrainingTask:
        train, val = split(data(), seed, *rows)
        net = model()
        return TrainingTask(net, optimizer(net), loss, train, val, batch, **options)

    return Kind(build, steps, interval or (ADAM if optimizer is adam else SGD))


def images() -> Part:
    return digits()[0], digits()[0].flatten(1)


mse = functional.mse_loss
net1, net3 = partial(mlp, 64, 1), partial(mlp, 64, 3)

KINDS: dict[str, Kind] = {
    "plain net": classify(net1, 400),
    "plain net, AdamW": classify(net3, 300, adam),
    "batch norm": classify(partial(convnet, True), 300),
    "convolutions": classify(partial(convnet, False), 300),
    "60 steps": classify(net1, 60),
    "100 steps": classify(net3, 100, adam),
    "150 steps": classify(partial(convnet, True), 150),
    "20 rows of validation": classify(net1, 300, rows=(1000, 20)),
    "50 rows of validation": classify(net3, 300, adam, rows=(1000, 50)),
    "loss + 1000": classify(net1, 300, loss=partial(shifted, 1000.0, 1.0)),
    "loss x 1e-4": classify(net3, 300, adam, loss=partial(shifted, 0.0, 1e-4)),
    "loss - 30": classify(partial(convnet, True), 300, loss=partial(shifted, -30.0, 1.0)),
    "40 % wrong labels": classify(partial(mlp, 128, 2), 900, rows=(400, 397), noise=0.4),
    "40 % wrong labels, AdamW": classify(partial(mlp, 128, 2), 600, adam, rows=(400, 397), noise=0.4),
    "100 rows by heart": classify(net3, 600, rows=(100, 397), batch=16),
    "ten layers of tanh": classify(partial(mlp, 48, 10, act=nn.Tanh), 500),
    "six sigmoids, AdamW": classify(partial(mlp, 48, 6, act=nn.Sigmoid), 600, adam),
    "inputs x 100": classify(net3, 300, scale=100.0),
    "loss x 1000": classify(net1, 300, loss=partial(shifted, 0.0, 1000.0)),
    "rows of images, LSTM": classify(lambda: Recurrent(nn.LSTM, 8, 48, 10), 300, adam, clip_norm=1.0),
    "sum of two, RNN": on(addition, lambda: Recurrent(nn.RNN, 2, 32, 1), 500, mse, (2000, 400), clip_norm=1.0),
    "sum of two, GRU": on(addition, lambda: Recurrent(nn.GRU, 2, 32, 1), 400, mse, (2000, 400)),
    "flow (negative loss)": on(rings, Couplings, 500, mean, (2400, 600), batch=64),
    "contrastive": classify(Twins, 300, adam, loss=matching, batch=64),
    "two adversaries": classify(Adversaries, 500, loss=of_both),
    "codebook": on(images, Codebook, 500, reconstruction, (1000, 397)),
    "outliers": on(heavy_tails, lambda: mlp(48, 2, 8, 1), 400, mse, (2000, 600)),
    "outliers, SGD": on(heavy_tails, lambda: mlp(48, 2, 8, 1), 400, mse, (2000, 600), sgd),
    "fourth powers": on(diabetes, lambda: mlp(32, 2, 10, 1), 300, spiky, (300, 142), batch=16),
    "raw targets": on(diabetes, lambda: mlp(32, 2, 10, 1), 400, mse, (300, 142), batch=16),
    "small table": on(cancer, lambda: mlp(32, 1, 30, 2), 200, functional.cross_entropy, (300, 100), sgd, 16),
}

RAW: dict[str, Kind] = {
    "raw pixels": classify(partial(mlp, 64, 2), 300, scale=255.0),
    "raw pixels, wider, plain SGD": classify(partial(mlp, 128, 2), 300, plain, scale=255.0),
    "raw pixels, AdamW": classify(partial(mlp, 64, 2), 300, adam, scale=255.0),
    "raw wine": on(
        partial(raw_table, load_wine), lambda: mlp(64, 2, 13, 3), 300, functional.cross_entropy, (106, 72), sgd
    ),
    "raw wine, AdamW": on(
        partial(raw_table, load_wine), lambda: mlp(64, 2, 13, 3), 300, functional.cross_entropy, (106, 72)
    ),
    "raw cancer": on(
        partial(raw_table, load_breast_cancer),
        lambda: mlp(64, 2, 30, 2),
        300,
        functional.cross_entropy,
        (341, 228),
        sgd,
    ),
    "raw cancer, AdamW": on(
        partial(raw_table, load_breast_cancer), lambda: mlp(64, 2, 30, 2), 300, functional.cross_entropy, (341, 228)
    ),
    "raw housing": on(housing, lambda: mlp(64, 2, 6, 1), 300, mse, (2000, 1000), batch=64),
    "raw housing, absolute error": on(
        housing, lambda: mlp(64, 2, 6, 1), 400, functional.l1_loss, (2000, 1000), batch=64
    ),
    "linear, small inputs": on(
        shares, lambda: mlp(64, 0), 300, functional.cross_entropy, (1000, 397), plain, interval=(1e-3, 1e3)
    ),
}

KINDS |= {name: replace(kind, raw=True) for name, kind in RAW.items()}


def best_constant(task: TrainingTask) -> float:
    """The validation loss of the constant prediction that is best on the training data."""
    (inputs, targets), (_, held_out) = task.train_data, task.val_data
    guess = task.model(inputs[:1]).detach().zero_().requires_grad_()
    optimizer = torch.optim.LBFGS([guess], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(guess.expand(len(targets), -1), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(task.loss(guess.detach().expand(len(held_out), -1), held_out))
