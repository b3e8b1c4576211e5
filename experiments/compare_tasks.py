"""The tasks of the comparison: real data, three splits, a small net each. Every choice is made on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from autolrs_ray.training.task import TrainingTask, accuracy

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Split = dict[str, tuple[Tensor, Tensor]]

DEFAULT_LR = {"sgd": 0.1, "adamw": 3e-3}
INTERVALS = {  # decades -> interval; around the default LR, but for the widest, which is the policy's own default
    "sgd": {2: (1e-2, 1.0), 4: (1e-3, 10.0), 6: (1e-5, 10.0)},
    "adamw": {2: (3e-4, 3e-2), 4: (3e-5, 3e-1), 6: (1e-6, 1.0)},
}
GRID = {name: [lr * 10 ** (i / 3) for i in range(-3, 4)] for name, lr in DEFAULT_LR.items()}
SCHEDULE_FREE_DEFAULT = {"sgd": 1.0, "adamw": 2.5e-3}
SCHEDULE_FREE_GRID = {name: [lr * 10 ** (i / 3) for i in range(-3, 4)] for name, lr in SCHEDULE_FREE_DEFAULT.items()}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 1e-2}


@dataclass(frozen=True)
class Task:
    """One task. steps: T. commits, probe_reports: options of the policies, lower where evaluating is dear."""

    name: str
    title: str
    steps: int
    optimizer: str
    split: Callable[[int], Split]  # of a seed
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    seeds: int
    has_accuracy: bool = True
    clip_norm: float | None = None
    commits: int = 10
    probe_reports: int = 8

    def build(self, seed: int, make_optimizer: MakeOptimizer | None = None) -> TrainingTask:
        data, model = self.split(seed), self.model()
        return TrainingTask(
            model=model,
            optimizer=(make_optimizer or self.default_optimizer)(model.parameters()),
            loss=self.loss,
            train_data=data["train"],
            val_data=data["val"],
            batch_size=self.batch_size,
            metrics={"accuracy": accuracy} if self.has_accuracy else {},
            clip_norm=self.clip_norm,
        )

    def default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        lr, decay = DEFAULT_LR[self.optimizer], WEIGHT_DECAY[self.optimizer]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


# -- digits ------------------------------------------------------------------------------------------------------------


@cache
def digits_split(seed: int) -> Split:
    """1,000 training, 397 validation and 400 test images, drawn anew for each seed: the set is too small for one draw."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(("train", "val", "test"), order.split([1000, 397, 400]), strict=True))
    return {name: (images[rows], labels[rows]) for name, rows in parts.items()}


@cache
def noisy_digits_split(seed: int) -> Split:
    """20 % of the labels of every split replaced by a random other one: the noise a labelled data set really has."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noisy = {}
    for name, (images, labels) in digits_split(seed).items():
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        shift = torch.randint(1, 10, (len(labels),), generator=generator)
        noisy[name] = (images, torch.where(wrong, (labels + shift) % 10, labels))
    return noisy


def convnet(channels: int, widths: tuple[int, ...], strides: tuple[int, ...], side: int) -> nn.Module:
    """Convolutions 3 x 3 with batch norm and ReLU, then one linear layer to 10 classes. side: width of the last map."""
    layers: list[nn.Module] = []
    for width, stride in zip(widths, strides, strict=True):
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 10))


def digits_model() -> nn.Module:
    return convnet(1, (16, 32, 32), (1, 2, 2), 2)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


@cache
def cifar_split(root: str, size: int, train_images: int) -> Split:
    """`train_images` training and 1,000 validation images of CIFAR-10's training set; 5,000 of its test set."""
    from torchvision.datasets import CIFAR10

    def load(train: bool) -> tuple[Tensor, Tensor]:
        dataset = CIFAR10(root, train=train, download=False)
        images = torch.tensor(dataset.data).permute(0, 3, 1, 2).float() / 255.0
        if size != 32:
            images = nn.functional.avg_pool2d(images, 32 // size)
        return (images - 0.47) / 0.25, torch.tensor(dataset.targets)

    images, labels = load(train=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:train_images], "val": order[train_images : train_images + 1000]}
    split = {name: (images[index], labels[index]) for name, index in rows.items()}
    test_images, test_labels = load(train=False)
    return {**split, "test": (test_images[:5000], test_labels[:5000])}


# -- characters --------------------------------------------------------------------------------------------------------

WINDOW = 32


def default_text() -> str:
    """The Python language reference by topics: 465 kB of English prose that every Python brings along."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@cache
def text_split(path: str | None) -> tuple[Split, int]:
    """Windows of 33 characters; every tenth block of 3,300 characters is validation, the one after it test.

    Returns the splits, inputs and targets (n, 32), and the size of the alphabet (the 127 most frequent characters and
    one for the rest). Raises ValueError for a text under 50,000 characters.
    """
    text = default_text() if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
    if len(text) < 50_000:
        raise ValueError(f"the text has {len(text)} characters; give one of at least 50,000 ({path})")
    frequent = sorted(set(text), key=lambda c: (-text.count(c), c))[:127]
    codes = {c: i for i, c in enumerate(frequent)}
    ids = torch.tensor([codes.get(c, len(frequent)) for c in text])
    windows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    block = torch.arange(len(windows)) // 100 % 10
    rows = {"train": block < 8, "val": block == 8, "test": block == 9}
    split = {name: (windows[mask][:, :-1], windows[mask][:, 1:]) for name, mask in rows.items()}
    split["val"] = (split["val"][0][:400], split["val"][1][:400])
    return split, len(frequent) + 1


class CharModel(nn.Module):
    """Embedding, one GRU, a linear read-out: (n, 32) characters -> (n, alphabet, 32) logits."""

    def __init__(self, alphabet: int, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 32)
        self.rnn = nn.GRU(32, width, batch_first=True)
        self.output = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        return self.output(self.rnn(self.embedding(characters))[0]).transpose(1, 2)


# -- the list ----------------------------------------------------------------------------------------------------------

DEFAULT_TASKS = ("digits", "digits_noise", "char_lm")


def make_task(name: str, data_dir: str | None = None, text: str | None = None) -> Task:
    """The task `name`. data_dir: torchvision root that holds cifar-10-batches-py (CIFAR tasks). text: path of a text."""
    cross_entropy = nn.functional.cross_entropy
    if name in ("digits", "digits_noise"):
        noisy = name == "digits_noise"
        batch_size = 8 if noisy else 32  # 7 epochs and 29: with noisy labels, more epochs learn the noise by heart
        return Task(name, name, 900, "sgd", noisy_digits_split if noisy else digits_split, digits_model, cross_entropy,
                    batch_size, 5, commits=20, probe_reports=16)  # fmt: skip
    if name == "char_lm":
        return Task(name, "characters: GRU, AdamW, batch 16 x 32", 600, "adamw", lambda seed: text_split(text)[0],
                    lambda: CharModel(text_split(text)[1]), cross_entropy, 16, 3, has_accuracy=False,
                    clip_norm=1.0)  # fmt: skip
    if name in ("cifar16", "cifar32"):
        if data_dir is None:
            raise ValueError(f"task {name} needs --data-dir, a torchvision root that holds cifar-10-batches-py")
        size = int(name[-2:])
        widths, strides = ((12, 24, 48), (1, 2, 2)) if size == 16 else ((16, 32, 64, 64), (1, 2, 2, 2))
        return Task(name, f"CIFAR-10 at {size} x {size}: 5,000 images, SGD, batch 64", 600, "sgd",
                    lambda seed: cifar_split(data_dir, size, 5000), lambda: convnet(3, widths, strides, 4), cross_entropy, 64,
                    3)  # fmt: skip
    raise ValueError(f"unknown task {name!r}: use one of digits, digits_noise, char_lm, cifar16, cifar32")
