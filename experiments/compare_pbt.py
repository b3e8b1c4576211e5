"""Ray Tune's own PBT and PB2 on the LR: a population of `SLOTS` trials, each trained for T steps.

The LR is drawn from the 2 decades around the default and changed every T / 15 steps. PB2 searches log10 LR (its own scale
is linear). On fewer CPUs than trials Tune takes turns; compute and wall-clock are stated for `SLOTS` slots.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pb2 import PB2

from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.trainable import AutoLRSTrainable, trainable_for
from experiments.compare_lab import Outcome
from experiments.compare_methods import SLOTS
from experiments.compare_tasks import INTERVALS, Task

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def ray_session(cpus: int = 4) -> Iterator[None]:
    """A local Ray in a short temporary folder, gone afterwards."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    folder = tempfile.mkdtemp(prefix="alr", dir="/tmp")  # socket paths end at 107 bytes
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=80_000_000,
             log_to_driver=False, _temp_dir=folder)  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _trainable(task: Task, seed: int) -> type[AutoLRSTrainable]:
    base = trainable_for(lambda config: task.build(seed), task.name)

    def with_lr(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "lr": 10.0 ** config["log10_lr"]} if "log10_lr" in config else config

    class Population(base):  # type: ignore[misc, valid-type]
        def setup(self, config: dict[str, Any]) -> None:
            import torch

            torch.set_num_threads(1)
            super().setup(with_lr(config))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return bool(super().reset_config(with_lr(new_config)))

    return Population


def run_pbt(method: str, task: Task, seed: int) -> Outcome:
    """One run of "PBT" or "PB2"; the member with the best final validation loss is the model."""
    low, high = INTERVALS[task.optimizer][2]
    interval = task.steps // 15
    common = dict(time_attr="step", metric="val_loss", mode="min", perturbation_interval=interval)
    config: dict[str, Any] = {"seed": seed, "report_every": interval}
    if method == "PBT":
        config["lr"] = tune.loguniform(low, high)
        scheduler: Any = PopulationBasedTraining(hyperparam_mutations={"lr": config["lr"]}, **common)
    else:
        config["log10_lr"] = tune.uniform(math.log10(low), math.log10(high))
        scheduler = PB2(hyperparam_bounds={"log10_lr": [math.log10(low), math.log10(high)]}, **common)
    folder = tempfile.mkdtemp(prefix="alr-pbt", dir="/tmp")
    try:
        analysis = tune.run(
            _trainable(task, seed), name="population", storage_path=folder, config=config, num_samples=SLOTS,
            scheduler=scheduler, stop={"step": task.steps}, reuse_actors=True, checkpoint_at_end=True, verbose=0,
            keep_checkpoints_num=4, raise_on_failed_trial=True,
        )  # fmt: skip
        best = analysis.get_best_trial("val_loss", "min", scope="last")
        trainer = Trainer(lambda: task.build(seed), seed)
        trainer.load(best.checkpoint.path)
        if trainer.step != task.steps:
            raise RuntimeError(f"{method}: the best member stopped at step {trainer.step} of {task.steps}")
        test = trainer.evaluate(task.split(seed)["test"])
        compute = float(SLOTS)
        val_loss = best.last_result["val_loss"]
        return Outcome(test["loss"], test.get("accuracy"), val_loss, compute, 1.0, best.last_result["lr"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
