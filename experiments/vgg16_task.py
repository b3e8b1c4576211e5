"""VGG16 with batch norm on CIFAR-10 or CIFAR-100: the data set lies on the device as uint8 and is augmented there, in batch.

There are no loader workers and no host work per image: the batch at step t, its crops and its flips are functions of the
seed and t alone, so all trials see the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from autolrs_ray.training.task import TrainingTask, accuracy

BATCH_SIZE = 128
DEFAULT_PEAK = 0.1
PAD = 4
PADDINGS = ("zero", "reflect")
STATISTICS = {  # mean and standard deviation of the training pixels, in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Settings:
    """What a run trains, apart from its schedule and seed. width: factor of all channel numbers; data_dir: torchvision's.

    train_images, val_images: how many of torchvision's 50,000 training images are trained on and held out.
    compile: False, True or a mode of torch.compile ("reduce-overhead": CUDA graphs).
    """

    dataset: str = "cifar10"
    data_dir: str = "data"
    width: float = 1.0
    train_images: int = 45_000
    val_images: int = 5_000
    padding: str = "zero"
    autocast: bool = False
    channels_last: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        if self.dataset not in CLASSES:
            raise ValueError(f"dataset must be one of {sorted(CLASSES)}, got {self.dataset!r}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}, got {self.padding!r}")
        if not self.width > 0:
            raise ValueError(f"width must be positive, got {self.width}")
        if self.train_images < BATCH_SIZE or self.val_images < 1:
            raise ValueError(
                f"train_images must be at least {BATCH_SIZE} (one batch) and val_images at least 1, got "
                f"{self.train_images=}, {self.val_images=}"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """The settings in a trial's configuration, which holds more than them."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @property
    def steps_per_epoch(self) -> int:
        return self.train_images // BATCH_SIZE


# -- data --------------------------------------------------------------------------------------------------------------


def read_cifar(dataset: str, data_dir: str, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """torchvision's CIFAR-10 or CIFAR-100 as it is: images (n, 3, 32, 32) uint8 and labels (n,) int64.

    Raises RuntimeError (torchvision's) where `data_dir` does not hold it.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    found = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset](data_dir, train=train, download=download)
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


@cache
def load(dataset: str, data_dir: str, train_images: int, val_images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Training and validation images, drawn once and for all from torchvision's training set; read once per process."""
    images, labels = read_cifar(dataset, data_dir, train=True)
    if train_images + val_images > len(images):
        raise ValueError(f"{train_images=} and {val_images=} are more than the {len(images)} training images there are")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    val, train = order[:val_images], order[val_images : val_images + train_images]
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val])}


# -- augmentation ------------------------------------------------------------------------------------------------------


def draw_moves(count: int, generator: torch.Generator) -> Tensor:
    """(3, count) int64: top and left corner of each crop in the padded image, in [0, 8], and 1 where it is flipped."""
    corners = torch.randint(0, 2 * PAD + 1, (2, count), generator=generator)
    return torch.cat([corners, torch.randint(0, 2, (1, count), generator=generator)])


def crop_and_flip(images: Tensor, moves: Tensor, padding: str) -> Tensor:
    """Pad `images` (n, c, s, s) by 4, crop back to (s, s) at `moves` (3, n), flip left to right: one gather, no loop.

    padding: "zero" (black) or "reflect" (the edge pixel not repeated), as torchvision's RandomCrop has them.
    """
    size, device = images.shape[-1], images.device
    top, left, flip = moves[:, :, None]
    line = torch.arange(size, device=device)
    rows = top + line - PAD
    columns = left + torch.where(flip == 1, size - 1 - line, line) - PAD
    if padding == "reflect":
        rows, columns = (size - 1 - (size - 1 - index.abs()).abs() for index in (rows, columns))
        return _gather(images, rows, columns)
    inside = [(index >= 0) & (index < size) for index in (rows, columns)]
    cropped = _gather(images, rows.clamp(0, size - 1), columns.clamp(0, size - 1))
    return cropped * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    moved: Tensor = images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]
    return moved


def augment(images: Tensor, generator: torch.Generator, padding: str = "zero") -> Tensor:
    """`images` cropped and flipped at random; the draws are made on the host and sent without waiting for the device."""
    moves = draw_moves(len(images), generator).to(images.device, non_blocking=True)
    return crop_and_flip(images, moves, padding)


# -- model -------------------------------------------------------------------------------------------------------------


class Normalise(nn.Module):
    """uint8 images (n, 3, h, w) to floats of zero mean and unit variance per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", 255.0 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def vgg16(dataset: str, width: float = 1.0) -> nn.Sequential:
    """torchvision's VGG16 layers with batch norm for uint8 images of 32 x 32, and one linear head: 14.7 M parameters.

    width scales the channels, to multiples of 8.
    """
    from torchvision.models.vgg import cfgs, make_layers

    plan = [v if isinstance(v, str) else max(8, 8 * round(v * width / 8)) for v in cfgs["D"]]
    features = make_layers(plan, batch_norm=True)
    channels = int(plan[-2])
    return nn.Sequential(Normalise(*STATISTICS[dataset]), features, nn.Flatten(), nn.Linear(channels, CLASSES[dataset]))


def build(config: dict[str, Any]) -> TrainingTask:
    """The task of `config`, which holds the fields of :class:`Settings`: SGD, momentum 0.9, weight decay 5e-4."""
    settings = Settings.of(config)
    torch.backends.cudnn.benchmark = True  # all training batches have one shape
    data = load(settings.dataset, settings.data_dir, settings.train_images, settings.val_images)
    model = vgg16(settings.dataset, settings.width)
    return TrainingTask(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=DEFAULT_PEAK, momentum=0.9, weight_decay=5e-4, fused=True),
        loss=nn.functional.cross_entropy,
        train_data=data["train"],
        val_data=data["val"],
        batch_size=BATCH_SIZE,
        eval_batch_size=1000,
        metrics={"accuracy": accuracy},
        augment=partial(augment, padding=settings.padding),
        autocast=settings.autocast,
        channels_last=settings.channels_last,
        compile=settings.compile,
    )
