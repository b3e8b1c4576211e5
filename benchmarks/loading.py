"""Images in folders: a TrainingTask with workers beside torch's own loop over a DataLoader."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from benchmarks.section import Section, spread

CLASSES, SIZE, BATCH, LR = 4, 96, 32, 0.01


def make_folders(folder: Path, images: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(images):
        path = folder / str(i % CLASSES) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def dataset(folder: Path) -> Dataset[Any]:
    steps = [transforms.RandomCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    found: Dataset[Any] = ImageFolder(str(folder), transforms.Compose(steps))
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


def theirs(folder: Path, workers: int) -> Callable[[int], None]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(dataset(folder), BATCH, shuffle=True, drop_last=True, num_workers=workers,
                        persistent_workers=workers > 0)  # fmt: skip
    batches = (batch for _ in iter(int, 1) for batch in loader)

    def train(count: int) -> None:
        for inputs, targets in islice(batches, count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return train


def ours(folder: Path, workers: int) -> Callable[[int], None]:
    def build() -> TrainingTask:
        model, data = network(), dataset(folder)
        return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=LR), nn.functional.cross_entropy, data, data, BATCH,
                            num_workers=workers)  # fmt: skip

    trainer = Trainer(build)

    def train(count: int) -> None:
        trainer.train(trainer.step + count, lambda step: LR)

    return train


def cpu_s() -> float:
    """Seconds of CPU time that this process and its workers have taken: those of busy neighbours do not count."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def measure(quick: bool) -> Section:
    steps, rounds, workers = (10, 2, 2) if quick else (60, 5, 2)
    with tempfile.TemporaryDirectory() as name:
        make_folders(Path(name), 20 * BATCH)
        loops = {f"torch's loop, {workers} workers": theirs(Path(name), workers),
                 f"TrainingTask, num_workers={workers}": ours(Path(name), workers)}  # fmt: skip
        rates: dict[str, list[float]] = {label: [] for label in loops}
        spent: dict[str, list[float]] = {label: [] for label in loops}
        for train in loops.values():
            train(5)
        for _ in range(rounds):
            for label, train in loops.items():
                before, began = cpu_s(), time.perf_counter()
                train(steps)
                rates[label].append(steps * BATCH / (time.perf_counter() - began))
                time.sleep(0.5)  # what is loaded ahead is as much for both
                spent[label].append((cpu_s() - before) / steps / BATCH * 1e6)
    first = max(next(iter(rates.values())))
    rows = [
        (label, spread(found, 0), f"{max(found) / first:.2f}", spread(spent[label], 0))
        for label, found in rates.items()
    ]
    return Section(
        f"Images of {SIZE} x {SIZE} in folders, images a second, median (min-max)",
        ("loop", "images/s", "best over best", "CPU time per image, µs"),
        rows,
    )
