"""Trainables as people write them for PBT, on a small quadratic, and ways to get them wrong. No torch: quick to start."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

import autolrs_ray


class Quadratic:
    """Gradient descent on 0.5 * sum(c * w**2) with curvatures from 0.1 to 1: the best constant LR is about 1.8."""

    def __init__(self) -> None:
        self.c, self.w, self.step = np.linspace(0.1, 1.0, 10), np.ones(10), 0

    def train(self, lr: float, steps: int) -> float:
        for _ in range(steps):
            self.w = self.w - lr * self.c * self.w
            self.step += 1
        return self.loss

    @property
    def loss(self) -> float:
        return float(0.5 * (self.c * self.w**2).sum())

    def save(self, folder: str) -> None:
        Path(folder, "w.json").write_text(json.dumps([self.w.tolist(), self.step]))

    def load(self, folder: str) -> None:
        w, self.step = json.loads(Path(folder, "w.json").read_text())
        self.w = np.array(w)


class ClassTrainable(tune.Trainable):
    """The class API, reporting every 10 steps."""

    def setup(self, config: dict[str, Any]) -> None:
        self.problem, self.lr = Quadratic(), config["lr"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.problem, self.lr = Quadratic(), new_config["lr"]
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(self.config.get("pause_s", 0.0))
        loss = self.problem.train(self.lr, 10)
        return {"step": self.problem.step, "val_loss": loss, "train_loss": loss, "lr": self.lr}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.problem.save(checkpoint_dir)

    def load_checkpoint(self, checkpoint: str) -> None:
        self.problem.load(checkpoint)


def function_trainable(config: dict[str, Any]) -> None:
    """The function API, with a checkpoint at every report."""
    problem = Quadratic()
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            problem.load(folder)
    while True:
        loss = problem.train(config["lr"], 10)
        with tempfile.TemporaryDirectory() as folder:
            problem.save(folder)
            tune.report(
                {"step": problem.step, "val_loss": loss, "lr": config["lr"]},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )


# -- ways to get it wrong ----------------------------------------------------------------------------------------------


class IgnoresLR(ClassTrainable):
    def step(self) -> dict[str, Any]:
        self.lr = 0.5
        return {**super().step(), "lr": self.config["lr"]}


class ForgetsItsState(ClassTrainable):
    def load_checkpoint(self, checkpoint: str) -> None:
        pass


class CannotBeReused(ClassTrainable):
    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return False


class ResourcesByRole(ClassTrainable):
    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        role = config["autolrs"]
        return tune.PlacementGroupFactory([{"CPU": 2.0 if role == "main" else 1.0}])


class RaisesInSetup(ClassTrainable):
    def setup(self, config: dict[str, Any]) -> None:
        raise {"OSError": OSError, "RuntimeError": RuntimeError}[config["error"]]("no such data set: /data/nowhere")


class Reports(ClassTrainable):
    """Puts config["report"] into its result, and leaves out config["omit"]."""

    def setup(self, config: dict[str, Any]) -> None:
        super().setup(config)
        self.changes, self.omit = config.get("report", {}), config.get("omit")

    def step(self) -> dict[str, Any]:
        result = {**super().step(), **self.changes}
        result.pop(self.omit, None)
        return result


class TensorMetric(ClassTrainable):
    def step(self) -> dict[str, Any]:
        import torch

        result = super().step()
        return {**result, "val_loss": torch.tensor(result["val_loss"])}


class Silent(ClassTrainable):
    """Its first probe never comes back."""

    def step(self) -> dict[str, Any]:
        flag = Path(self.config["flag"])
        if not flag.exists():
            flag.touch()
            time.sleep(3600)
        return super().step()


class KillsItself(ClassTrainable):
    """Its process is killed once per role named in config["kill"], at the first report of that role."""

    def step(self) -> dict[str, Any]:
        role = self.config["autolrs"]["role"]
        flag = Path(self.config["flag"] + role)
        if role in self.config["kill"] and not (self.config.get("once", True) and flag.exists()):
            flag.touch()
            os.kill(os.getpid(), 9)
        return super().step()


def forgets_the_checkpoint(config: dict[str, Any]) -> None:
    problem = Quadratic()
    while True:
        tune.report({"step": problem.step + 10, "val_loss": problem.train(config["lr"], 10)})


def stops_early(config: dict[str, Any]) -> None:
    problem = Quadratic()
    for _ in range(3):
        tune.report({"step": problem.step + 10, "val_loss": problem.train(config["lr"], 10)})


class Enveloped(ClassTrainable):
    """Applies the LR of every step, as a loop of one's own does under the anchored policy."""

    def step(self) -> dict[str, Any]:
        for _ in range(10):
            self.lr = autolrs_ray.lr_at(self.config, self.problem.step)
            loss = self.problem.train(self.lr, 1)
        return {"step": self.problem.step, "val_loss": loss, "lr": self.lr}


def noted(problem: Quadratic, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train `steps` steps, each noted with its learning rate in the file config["log"], and return the report."""
    with open(config["log"], "a") as log:
        for _ in range(steps):
            lr = autolrs_ray.lr_at(config, problem.step)
            print(json.dumps([problem.step, lr]), file=log)
            problem.train(lr, 1)
    return {"step": problem.step, "val_loss": problem.loss, "lr": lr}


class NotesUpdates(ClassTrainable):
    """The class API, with a note of every update."""

    def step(self) -> dict[str, Any]:
        return noted(self.problem, self.config, 10)


def notes_updates(config: dict[str, Any]) -> None:
    """The function API, with a note of every update: a report every 5 steps, and a checkpoint at every second one."""
    problem = Quadratic()
    if tune.get_checkpoint():
        with tune.get_checkpoint().as_directory() as folder:
            problem.load(folder)
    while True:
        report = noted(problem, config, 5)
        with tempfile.TemporaryDirectory() as folder:
            problem.save(folder)
            due = problem.step % 10 == 0
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder) if due else None)


class NoLR(ClassTrainable):
    def step(self) -> dict[str, Any]:
        result = super().step()
        del result["lr"]
        return result


class Gain(ClassTrainable):
    """A metric to be maximised whose losses are negative."""

    def step(self) -> dict[str, Any]:
        result = super().step()
        return {"step": result["step"], "gain": 5.0 - result["val_loss"]}


class Slopes(ClassTrainable):
    """The loss rises or falls with the learning rate all over the interval, by config["slope"]."""

    def step(self) -> dict[str, Any]:
        result = super().step()
        loss = 20.0 + self.config["slope"] * float(np.log(self.lr)) - 0.01 * result["step"]
        return {**result, "val_loss": loss, "train_loss": loss}
