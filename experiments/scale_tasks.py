"""The tasks of the comparison at size: what is trained, at what batch and for how long.

cifar10, cifar100: VGG16, SGD, as in :mod:`experiments.vgg16_task`. resnet: a ResNet-20 on CIFAR-10, AdamW, label smoothing.
finetune: the same network trained on the even classes of CIFAR-100, tuned to 50 images of each odd one. bytes: a pre-norm
transformer, AdamW, on the source text of Python's standard library. Every choice is made on validation data.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autolrs_ray.training.task import TrainingTask, accuracy
from autolrs_ray.training.trainer import Trainer
from experiments.cluster_job import parameter_groups
from experiments.vgg16_task import BATCH_SIZE, CLASSES, STATISTICS, Normalise, Settings, augment, load, read_cifar
from experiments.vgg16_task import build as build_vgg16

Split = tuple[Tensor, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class ScaleTask:
    """build: what is trained, of `config`. test: its test split. rows: of the training data (windows of text, for bytes).

    peaks: of the linear schedules, the middle one the untuned one; constants: of the constant ones; wide_peaks, wide_constants:
    these with two more at the end where the best of the fewer was found: lower ones for VGG16, higher ones for the ResNet.
    interval: of the paper's policy. prepare: makes what `build` reads, once.
    """

    name: str
    title: str
    build: Callable[[Config], TrainingTask]
    test: Callable[[Config], Split]
    config: Config
    rows: int
    epochs: float
    peaks: tuple[float, float, float]
    constants: tuple[float, float]
    wide_peaks: tuple[float, ...]
    wide_constants: tuple[float, ...]
    interval: tuple[float, float]
    prepare: Callable[[Config], None] = lambda config: None

    @property
    def batch_size(self) -> int:
        return int(self.config["batch_size"])

    @property
    def steps(self) -> int:
        return round(self.epochs * (self.rows // self.batch_size))

    def trainer(self, seed: int, averaging: bool = False) -> Trainer:
        return Trainer(lambda: self.build(self.config), seed, averaging)


SGD: dict[str, Any] = {
    "peaks": (0.03, 0.1, 0.3), "wide_peaks": (0.003, 0.01, 0.03, 0.1, 0.3),
    "constants": (0.01, 0.03), "wide_constants": (0.001, 0.003, 0.01, 0.03), "interval": (1e-3, 1e-1),
}  # fmt: skip
ADAMW: dict[str, Any] = {
    "peaks": (3e-4, 1e-3, 3e-3), "wide_peaks": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "constants": (3e-4, 1e-3), "wide_constants": (3e-4, 1e-3, 3e-3, 1e-2), "interval": (1e-4, 1e-2),
}  # fmt: skip


# -- a residual network ------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """uint8 images (n, 3, 32, 32) -> (n, classes): three stages of `blocks` residual blocks, `width` channels at first."""

    def __init__(self, dataset: str, classes: int, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.stem = nn.Sequential(
            Normalise(*STATISTICS[dataset]),
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        layers, channels = [], width
        for stage in range(3):
            for block in range(blocks):
                planes, stride = width * 2**stage, 2 if stage and not block else 1
                shortcut = None
                if stride > 1:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
                    )
                layers.append(BasicBlock(channels, planes, stride, shortcut))
                channels = planes
        self.blocks, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(images))).flatten(1))


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and filters only."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, fused=True)


def _image_task(
    model: nn.Module,
    train: Split,
    val: Split,
    config: Config,
    batch_size: int = BATCH_SIZE,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> TrainingTask:
    return TrainingTask(
        model=model,
        optimizer=adamw(model, 1e-3, 0.05),
        loss=loss,
        train_data=train,
        val_data=val,
        batch_size=batch_size,
        eval_batch_size=1000,
        metrics={"accuracy": accuracy},
        augment=partial(augment, padding=config["padding"]),
        autocast=config["autocast"],
        channels_last=config["channels_last"],
        compile=config["compile"],
    )


def build_resnet(config: Config) -> TrainingTask:
    data = load(config["dataset"], config["data_dir"], config["train_images"], config["val_images"])
    model = ResNet(config["dataset"], CLASSES[config["dataset"]], round(16 * config["width"]))
    smoothed = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    return _image_task(model, data["train"], data["val"], config, config["batch_size"], smoothed)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def half(split: Split, odd: bool) -> Split:
    """The images of every second class, which are numbered anew from 0 on."""
    images, labels = split
    rows = labels % 2 == int(odd)
    return images[rows], labels[rows] // 2


def few(split: Split, count: int) -> Split:
    """The first `count` images of every class."""
    rows = torch.cat([torch.nonzero(split[1] == label)[:count, 0] for label in split[1].unique()])
    return split[0][rows], split[1][rows]


def _halves(config: Config, odd: bool) -> dict[str, Split]:
    data = load("cifar100", config["data_dir"], config["train_images"], config["val_images"])
    return {name: half(split, odd) for name, split in data.items()}


def build_pretraining(config: Config) -> TrainingTask:
    data = _halves(config, odd=False)
    model = ResNet("cifar100", 50, round(16 * config["width"]))
    return _image_task(model, data["train"], data["val"], config)


def pretrain(config: Config) -> None:
    """Train on the even classes, by a linear decay; the weights lie in config["weights"]. Does nothing where they do."""
    weights = Path(config["weights"])
    if weights.exists():
        return
    trainer = Trainer(lambda: build_pretraining(config), 0)
    steps = round(config["pretraining_epochs"] * trainer.steps_per_epoch)
    trainer.train(steps, lambda step: 3e-3 * (1 - step / steps))
    print(f"trained on the even classes: {trainer.evaluate()}", flush=True)
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.model.state_dict(), weights.with_suffix(".part"))
    os.replace(weights.with_suffix(".part"), weights)


def build_finetune(config: Config) -> TrainingTask:
    """The head is new; the rest is as it was trained, and trained on."""
    data = _halves(config, odd=True)
    model = ResNet("cifar100", 50, round(16 * config["width"]))
    state = torch.load(config["weights"], map_location="cpu", weights_only=True)
    model.load_state_dict({**state, **{f"head.{name}": value for name, value in model.head.state_dict().items()}})
    train = few(data["train"], config["tuned_images"])
    return _image_task(model, train, data["val"], config, config["batch_size"])


# -- bytes of source text ----------------------------------------------------------------------------------------------

WINDOW = 256
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def source_files(root: Path) -> dict[str, list[Path]]:
    """The library's modules without its tests, which not every Python brings along. Of 20 files one is for validation and one
    for the test, by a hash of the path."""
    parts: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED & set(relative.parts):
            place = hashlib.blake2b(relative.as_posix().encode(), digest_size=4).digest()[0] % 20
            parts[{0: "val", 1: "test"}.get(place, "train")].append(path)
    return parts


@cache
def byte_windows(root: str, val_windows: int) -> dict[str, Split]:
    """Inputs and targets (n, 256) uint8, the targets one byte on. val_windows: of validation, spread evenly over its files.

    Raises ValueError for too little text.
    """
    splits = {}
    for name, files in source_files(Path(root)).items():
        text = b"".join(path.read_bytes() for path in files)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        count = max(0, len(data) - 1) // WINDOW
        if count < val_windows:
            raise ValueError(
                f"{root}: {len(data)} bytes of Python for {name} are under {val_windows} windows of {WINDOW}"
            )
        rows = torch.arange(val_windows) * count // val_windows if name == "val" else torch.arange(count)
        starts = rows[:, None] * WINDOW + torch.arange(WINDOW)
        splits[name] = (data[starts], data[starts + 1])
    return splits


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norms[1](x))


class ByteModel(nn.Module):
    """Bytes (n, length) uint8 -> logits (n, length, 256)."""

    def __init__(self, width: int = 256, layers: int = 3, heads: int = 4, length: int = WINDOW) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in (self.embedding, self.positions):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text.long()) + self.positions.weight[: text.shape[1]]
        return self.output(self.norm(self.blocks(x)))


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per byte, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def byte_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(2) == targets).float().mean()


def build_bytes(config: Config) -> TrainingTask:
    data = byte_windows(config["text"], config["val_windows"])
    model = ByteModel(8 * round(32 * config["width"]), config["layers"])
    return TrainingTask(
        model=model,
        optimizer=adamw(model, 1e-3, 0.1),
        loss=byte_loss,
        train_data=data["train"],
        val_data=data["val"],
        batch_size=config["batch_size"],
        eval_batch_size=32,
        metrics={"accuracy": byte_accuracy},
        clip_norm=1.0,
        autocast=config["autocast"],
        compile=config["compile"],
    )


# -- the list ----------------------------------------------------------------------------------------------------------

TASKS = ("finetune", "resnet", "bytes", "cifar10", "cifar100")


def make_task(
    name: str,
    data_dir: str = "data",
    work_dir: str = "runs/scale",
    width: float | None = None,
    epochs: float | None = None,
    text: str | None = None,
    **config: Any,
) -> ScaleTask:
    """The task `name`. data_dir: torchvision's root. work_dir: where what `prepare` makes lies. width: factor of the layers'
    widths; epochs: of a run (None: the task's own). text: folder of Python files. config: anything else in the configuration.

    Raises ValueError for a name there is none of.
    """
    common = asdict(Settings("cifar10", os.path.abspath(data_dir), autocast=True, channels_last=True))
    if name in CLASSES:
        settings = {**common, "batch_size": BATCH_SIZE, "dataset": name, "width": width or 0.5, **config}
        title = f"VGG16, {name.replace('cifar', 'CIFAR-')}, SGD"
        return ScaleTask(name, title, build_vgg16, lambda c: read_cifar(name, c["data_dir"], train=False), settings,
                         settings["train_images"], epochs or 12, **SGD)  # fmt: skip
    if name == "resnet":
        settings = {**common, "batch_size": BATCH_SIZE, "width": width or 1.0, **config}
        return ScaleTask(name, "ResNet-20, CIFAR-10, AdamW, label smoothing", build_resnet,
                         lambda c: read_cifar("cifar10", c["data_dir"], train=False), settings, settings["train_images"],
                         epochs or 6, **ADAMW)  # fmt: skip
    if name == "finetune":
        weights = os.path.abspath(os.path.join(work_dir, f"even-classes-w{width or 1.0:g}.pt"))
        settings = {**common, "dataset": "cifar100", "batch_size": 32, "width": width or 1.0, "weights": weights,
                    "pretraining_epochs": 8, "tuned_images": 50, **config}  # fmt: skip
        return ScaleTask(name, "ResNet-20, from 50 classes of CIFAR-100 to 50 images of each other, AdamW", build_finetune,
                         lambda c: half(read_cifar("cifar100", c["data_dir"], train=False), odd=True), settings,
                         50 * settings["tuned_images"], epochs or 26, prepare=pretrain, **ADAMW)  # fmt: skip
    if name == "bytes":
        text = text or sysconfig.get_paths()["stdlib"]
        settings = {"text": text, "val_windows": 256, "width": width or 1.0, "layers": 3, "batch_size": 12,
                    "autocast": True, "compile": False, **config}  # fmt: skip
        rows = len(byte_windows(text, settings["val_windows"])["train"][0])
        return ScaleTask(name, "bytes of Python's library: transformer, AdamW", build_bytes,
                         lambda c: byte_windows(c["text"], c["val_windows"])["test"], settings, rows, epochs or 1,
                         **ADAMW)  # fmt: skip
    raise ValueError(f"unknown task {name!r}: use one of {', '.join(TASKS)}")
