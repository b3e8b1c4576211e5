"""What the examples of jobs on a cluster share: their command line, joining the cluster, and text that is encoded once."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autolrs_ray.outcome.result import RunResult
from experiments.vgg16_cifar import default_address, resources_of, start_ray


def parser(
    doc: str | None, name: str, epochs: float, data: str = "folder of the data, which all nodes see"
) -> argparse.ArgumentParser:
    """A command line with what every job needs. name: of the run, unless given; epochs: of the main training."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help=data)
    made.add_argument("--storage", required=True, help="folder of the runs, one that all nodes share, or a URI")
    made.add_argument("--name", default=name, help=f"of the run in it (default {name})")
    made.add_argument("--epochs", type=float, default=epochs, help=f"of the main training (default {epochs:g})")
    made.add_argument("--batch-size", type=int, default=256, help="rows of a step, over all workers (default 256)")
    made.add_argument("--gpus", type=int, help="per worker (default: 1 where the cluster has any)")
    made.add_argument("--cpus", type=float, default=1.0, help="per worker (default 1)")
    made.add_argument("--compile", action="store_true", help="torch.compile")
    return made


def join_cluster() -> None:
    """Ray of the job, or of RAY_ADDRESS, or one on this machine."""
    start_ray(default_address())


def resources(arguments: argparse.Namespace) -> dict[str, float]:
    """Of each worker, on the cluster that has been joined."""
    return resources_of(arguments.cpus, arguments.gpus, 1.0)


def made_once(stem: Path, files: Sequence[Path], details: Any, make: Callable[[], dict[str, Any]]) -> Path:
    """The file in which what `make` returns of `files` is kept, named after `stem`, their names and sizes, and `details`.

    A job that is submitted again finds what it has trained on: vocabularies do not come out alike twice.
    """
    sizes = [(file.name, file.stat().st_size) for file in files]
    digest = hashlib.blake2b(json.dumps([sizes, details]).encode(), digest_size=4).hexdigest()
    path = stem.with_name(f"{stem.name}-{digest}.pt").absolute()
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(make(), part)
        os.replace(part, path)
    return path


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and the weights of norms are not decayed."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def told(result: RunResult) -> str:
    """One line of JSON on what was found."""
    found = {"done": result.done, "lr": result.schedule.peak_lr, "loss": result.loss, "weights": result.weights}
    return json.dumps({**found, "compute": round(result.compute, 2), "checkpoint": result.checkpoint})
