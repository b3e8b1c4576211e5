"""torchvision's ResNet-50, or another of its models, on any folder of images: ImageNet's, or your own.

    python -m experiments.resnet_imagefolder --data photos --storage runs --epochs 30
    ray job submit --working-dir . -- python -m experiments.resnet_imagefolder --data /shared/imagenet --storage /shared/runs \
        --epochs 90 --batch-size 1024 --gpus 1 --cpus 12 --loaders 10 --compile

DATA/train/CLASS/*.jpeg is trained on, but for every 50th image, on which learning rates are chosen; DATA/val is read once, by
the final model. Trials grow into free GPUs. The same command again goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import autolrs_ray
from autolrs_ray import Trainer, TrainingTask, accuracy
from experiments import cluster_job
from experiments.vgg16_task import Normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform(size: int, train: bool) -> v2.Compose:
    """To uint8 images (3, size, size), cropped and flipped at random to train on; a quarter of the bytes of floats to send."""
    flips: list[Any] = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    centre: list[Any] = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([v2.ToImage(), *(flips if train else centre)])


def network(name: str, classes: int) -> nn.Module:
    """A model of torchvision, from its initial weights, on uint8 images."""
    return nn.Sequential(Normalise(MEAN, STD), torchvision.models.get_model(name, weights=None, num_classes=classes))


def build(config: dict[str, Any]) -> TrainingTask:
    train = ImageFolder(str(Path(config["data"], "train")), transform(config["size"], train=True))
    val = copy.copy(train)  # the same list of files
    val.transform = transform(config["size"], train=False)
    rows = torch.arange(len(train))
    held_out = rows % config["held_out"] == 0
    model = network(config["model"], len(train.classes))
    return TrainingTask(
        model=model,
        optimizer=torch.optim.SGD(cluster_job.parameter_groups(model, 5e-5), lr=0.1, momentum=0.9, nesterov=True),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        train_data=Subset(train, rows[~held_out].tolist()),
        val_data=Subset(val, rows[held_out].tolist()),
        batch_size=config["batch_size"],
        eval_batch_size=256,
        metrics={"accuracy": accuracy},
        num_workers=config["loaders"],
        autocast=True,
        channels_last=True,
        compile=config["compile"],
        sync_batch_norm=True,  # losses must not depend on how many workers a trial has at the time
    )


def parser() -> argparse.ArgumentParser:
    made = cluster_job.parser(__doc__, "resnet_imagefolder", epochs=90)
    made.add_argument("--model", default="resnet50", help="a model of torchvision (default resnet50)")
    made.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    made.add_argument("--held-out", type=int, default=50, help="every which image chooses (default 50)")
    made.add_argument("--loaders", type=int, default=0, help="processes a worker that load images (default 0: itself)")
    return made


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "size", "held_out", "loaders", "batch_size", "compile")
    return {"data": str(Path(arguments.data).absolute()), **{name: getattr(arguments, name) for name in names}}


def test_images(config: dict[str, Any]) -> ImageFolder:
    """Raises ValueError where DATA/val has other classes than DATA/train, whose numbers would be others then."""
    folders = [Path(config["data"], part) for part in ("train", "val")]
    classes = [sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) for folder in folders]
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))[:3]
        raise ValueError(f"{folders[0]} and {folders[1]} must have the same folders, one for each class: see {odd}")
    return ImageFolder(str(folders[1]), transform(config["size"], train=False))


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    config = config_of(arguments)
    test = test_images(config)  # what is wrong with it is known before days of training
    cluster_job.join_cluster()
    result = autolrs_ray.run(
        build,
        epochs=arguments.epochs,
        config=config,
        name=arguments.name,
        storage_path=arguments.storage,
        resources=cluster_job.resources(arguments),
        workers="elastic",
    )
    print(cluster_job.told(result))
    final = Trainer(lambda: build(config))
    final.model.load_state_dict(result.model_state())
    print("test:", final.evaluate(test))


if __name__ == "__main__":
    main()
