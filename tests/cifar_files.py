"""Small random files in CIFAR's own format, and the experiment's task on them for Ray's workers.

python -m tests.cifar_files --data-dir DIR ... is python -m experiments.vgg16_cifar on such files, which it writes to DIR.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets.cifar

from autolrs_ray.training.task import TrainingTask
from experiments import vgg16_cifar, vgg16_task


def write_cifar(folder: Path, seed: int = 0) -> None:
    """CIFAR-10 and CIFAR-100 with 300 training and 50 test images, noise around one colour per class."""
    generator = np.random.default_rng(seed)

    def write(path: Path, count: int, classes: int, key: str) -> None:
        labels = generator.integers(0, classes, count)
        colours = np.random.default_rng(9).integers(60, 196, (classes, 3, 1))
        pixels = colours[labels] + generator.integers(-60, 60, (count, 3, 1024))
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(pickle.dumps({"data": pixels.reshape(count, -1).astype(np.uint8), key: labels.tolist()}, 2))

    ten, hundred = folder / "cifar-10-batches-py", folder / "cifar-100-python"
    for i in range(1, 6):
        write(ten / f"data_batch_{i}", 60, 10, "labels")
    write(ten / "test_batch", 50, 10, "labels")
    write(hundred / "train", 300, 100, "fine_labels")
    write(hundred / "test", 50, 100, "fine_labels")
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}, 2))
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, 2))


def trusting(path: str, md5: str | None = None) -> bool:
    """torchvision's check_integrity without the sum, which only the true files have."""
    return os.path.isfile(path)


def build_trusting(config: dict[str, Any]) -> TrainingTask:
    """The experiment's task, in Ray's workers: they do not see the fixture's patch."""
    torchvision.datasets.cifar.check_integrity = trusting
    return vgg16_task.build(config)


if __name__ == "__main__":
    torchvision.datasets.cifar.check_integrity = trusting
    vgg16_cifar.build = build_trusting
    write_cifar(Path(sys.argv[sys.argv.index("--data-dir") + 1]))
    vgg16_cifar.main()
