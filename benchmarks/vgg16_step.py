"""How many images a second the VGG16 training step takes, beside torchvision's usual DataLoader pipeline.

    python -m benchmarks.vgg16_step --data-dir DIR [--dataset cifar10] [--width 1] [--steps 200] [--workers 2]

In several precisions, with averaged weights, compiled, and on a GPU with CUDA graphs; then the best without compilation
against the DataLoader with the same precision, and both ways of making batches alone, without a training step. Prints the
table and writes vgg16_step.json to --results.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from autolrs_ray.training.trainer import Trainer
from experiments import vgg16_report
from experiments.vgg16_task import BATCH_SIZE, CLASSES, PAD, STATISTICS, Settings, build, vgg16

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16, from NVIDIA's data sheets
WARM_UP = 10
LR = 0.05


def variants(base: Settings, on_gpu: bool) -> dict[str, tuple[Settings, bool]]:
    """Name -> settings, and whether weights are averaged."""
    nhwc = replace(base, channels_last=True)
    half = replace(nhwc, autocast=True)
    found = {"float32": (base, False), "float32, channels_last": (nhwc, False)}
    found["bfloat16, channels_last"] = (half, False)
    found["bfloat16, channels_last, averaged weights"] = (half, True)
    found["bfloat16, channels_last, compiled"] = (replace(half, compile=True), False)
    if on_gpu:
        graphs = replace(half, compile="reduce-overhead")
        found["bfloat16, channels_last, CUDA graphs"] = (graphs, False)
        found["bfloat16, channels_last, CUDA graphs, averaged weights"] = (graphs, True)
    return found


def rate(train: Callable[[int], None], steps: int) -> float:
    """Images per second of `train(count)`, which returns when the device has finished; a warm-up comes first."""
    train(WARM_UP)
    began = time.perf_counter()
    train(steps)
    return steps * BATCH_SIZE / (time.perf_counter() - began)


def step_rate(settings: Settings, averaging: bool, steps: int) -> float:
    """Images per second of Trainer.train alone, the data set and its augmentation on the device."""
    trainer = Trainer(lambda: build(asdict(settings)), averaging=averaging)

    def train(count: int) -> None:
        trainer.train(trainer.step + count, lambda step: LR)  # ends by reading the loss

    return rate(train, steps)


def batch_rate(settings: Settings, steps: int) -> float:
    """Images per second of drawing and augmenting batches on the device, without a training step."""
    trainer = Trainer(lambda: build(asdict(settings)))

    def train(count: int) -> None:
        for step in range(count):
            inputs, _ = trainer.batch(step)
        inputs[0, 0, 0, 0].item()

    return rate(train, steps)


def usual_pipeline(settings: Settings) -> Dataset[Any]:
    """torchvision's data set with random crop, flip, conversion and normalisation, image by image on the host."""
    from torchvision import transforms
    from torchvision.datasets import CIFAR10, CIFAR100

    steps = [transforms.RandomCrop(32, padding=PAD), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
             transforms.Normalize(*STATISTICS[settings.dataset])]  # fmt: skip
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[settings.dataset]
    found: Dataset[Any] = kind(settings.data_dir, train=True, transform=transforms.Compose(steps))
    return found


def loader_batches(settings: Settings, workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the usual pipeline on the device, for ever."""
    loader = DataLoader(usual_pipeline(settings), BATCH_SIZE, shuffle=True, drop_last=True, num_workers=workers,
                        pin_memory=device.type == "cuda", persistent_workers=workers > 0)  # fmt: skip
    while True:
        for inputs, targets in loader:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if settings.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, targets


def loader_rate(settings: Settings, steps: int, workers: int, device: torch.device) -> float:
    """Images per second of the same step fed by a DataLoader with `workers` processes."""
    model = vgg16(settings.dataset, settings.width)[1:].to(device)  # the pipeline normalises
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = loader_batches(settings, workers, device)
    total = torch.zeros((), device=device)

    def train(count: int) -> None:
        for inputs, targets in islice(batches, count):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total.add_(loss.detach())
        float(total)

    return rate(train, steps)


def loader_batch_rate(settings: Settings, steps: int, workers: int, device: torch.device) -> float:
    """Images per second of the usual pipeline without a training step."""
    batches = loader_batches(settings, workers, device)

    def train(count: int) -> None:
        (inputs, _) = deque(islice(batches, count), maxlen=1)[0]
        inputs[0, 0, 0, 0].item()

    return rate(train, steps)


def flops_per_image(dataset: str, width: float) -> float:
    """Floating-point operations of forward and backward pass, a multiply-add being two."""
    model = vgg16(dataset, width)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return float(counter.get_total_flops()) / 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="cifar10")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the DataLoader")
    parser.add_argument("--peak-tflops", type=float, help="bf16 matrix peak of the device (default: known GPUs' own)")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = arguments.peak_tflops or next((rate for key, rate in PEAK_TFLOPS.items() if key in name), None)
    base = Settings(arguments.dataset, arguments.data_dir, arguments.width)
    flops = flops_per_image(arguments.dataset, arguments.width)
    tried = variants(base, on_gpu)
    rates = {label: step_rate(settings, averaging, arguments.steps) for label, (settings, averaging) in tried.items()}
    plain = [label for label, (settings, averaging) in tried.items() if not settings.compile and not averaging]
    best = max(plain, key=rates.__getitem__)
    device = torch.device("cuda" if on_gpu else "cpu")
    loader = f"DataLoader, {arguments.workers} workers"
    rates[f"{best}, {loader}"] = fed = loader_rate(tried[best][0], arguments.steps, arguments.workers, device)
    rows = [
        dict(variant=label, images_per_s=round(found, 1), tflops=found * flops / 1e12,
             share_of_peak=None if peak is None else found * flops / 1e12 / peak, over_loader=found / fed)
        for label, found in rates.items()
    ]  # fmt: skip
    ours = batch_rate(tried[best][0], arguments.steps)
    theirs = loader_batch_rate(tried[best][0], arguments.steps, arguments.workers, device)
    for label, found in (("batches alone", ours), (f"batches alone, {loader}", theirs)):
        rows.append(dict(variant=label, images_per_s=round(found, 1), tflops=None, share_of_peak=None,
                         over_loader=found / theirs))  # fmt: skip
    common = dict(dataset=arguments.dataset, width=arguments.width, device=name, hardware=vgg16_report.hardware(),
                  date=date.today().isoformat())  # fmt: skip
    return [{**row, **common} for row in rows]


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    rows = measure(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    vgg16_report.replace(arguments.results / vgg16_report.STEP_FILE, json.dumps(rows, indent=1) + "\n")
    print(vgg16_report.step_section(rows))


if __name__ == "__main__":
    main()
