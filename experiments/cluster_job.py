"""What the examples of jobs on a cluster share: their command line, and joining the cluster."""

from __future__ import annotations

import argparse
import json

import torch

from autolrs_ray.outcome.result import RunResult
from experiments.vgg16_cifar import default_address, start_ray


def parser(doc: str | None, name: str, epochs: float) -> argparse.ArgumentParser:
    """A command line with what every job needs. name: of the run, unless given; epochs: of the main training."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder that all nodes see")
    made.add_argument("--storage", required=True, help="folder of the runs, one that all nodes share, or a URI")
    made.add_argument("--name", default=name, help=f"of the run in it (default {name})")
    made.add_argument("--epochs", type=float, default=epochs, help=f"of the main training (default {epochs:g})")
    made.add_argument("--batch-size", type=int, default=256, help="rows of a step, over all workers (default 256)")
    made.add_argument("--gpus", type=float, default=1.0 if torch.cuda.is_available() else 0.0, help="per worker")
    made.add_argument("--cpus", type=float, default=1.0, help="per worker (default 1)")
    made.add_argument("--compile", action="store_true", help="torch.compile")
    return made


def join_cluster() -> None:
    """Ray of the job, or of RAY_ADDRESS, or one on this machine."""
    start_ray(default_address())


def told(result: RunResult) -> str:
    """One line of JSON on what was found."""
    found = {"done": result.done, "lr": result.schedule.peak_lr, "loss": result.loss, "weights": result.weights}
    return json.dumps({**found, "compute": round(result.compute, 2), "checkpoint": result.checkpoint})
