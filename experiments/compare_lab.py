"""One task at one seed, with all that its methods share, and what a method finds there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.training.trainer import Trainer
from experiments.compare_tasks import Task
from experiments.memo import Memo, MemoTrainer, PerRunOrderTrainer


@dataclass
class Outcome:
    """What one method found with one seed. weights: "raw" or "averaged", whichever is the final model."""

    test_loss: float
    test_accuracy: float | None
    val_loss: float
    compute: float
    wall_clock: float
    lr: float | None = None
    weights: str = "raw"
    extra: dict[str, Any] = field(default_factory=dict)


class Lab:
    """One task at one seed, with the memo that all its methods share."""

    def __init__(self, task: Task, seed: int, folder: Path) -> None:
        self.task, self.seed = task, seed
        self.memo = Memo(folder / f"{task.name}-{seed}.sqlite")
        self._trainers: dict[str, MemoTrainer] = {}

    @property
    def test_data(self) -> tuple[Tensor, Tensor]:
        return self.task.split(self.seed)["test"]

    def trainer(
        self,
        averaging: bool = True,
        train_losses: bool = False,
        order: str = "common",
        averages: int | None = None,
    ) -> MemoTrainer:
        """The memo trainer for this data order; its snapshots live as long as the lab."""
        kind = Trainer if order == "common" else PerRunOrderTrainer
        if order not in self._trainers:
            self._trainers[order] = MemoTrainer(
                lambda: kind(lambda: self.task.build(self.seed), self.seed, averaging=True),
                self.memo,
                f"{self.task.name}/{self.seed}/{order}",
                lambda: self.test_data,
            )
        trainer = self._trainers[order]
        trainer.averaging, trainer.train_losses = averaging, train_losses
        trainer.averages = averages
        trainer.reset()
        trainer.grow(BatchGrowth())
        return trainer

    def outcome(self, trainer: MemoTrainer, weights: str, compute: float, wall: float, **fields: Any) -> Outcome:
        """Read the test split for the state `trainer` is in. weights "best": the better on validation."""
        losses = {name: trainer.evaluate(averaged=name == "averaged")["loss"] for name in candidates(weights)}
        chosen = min(losses, key=lambda name: finite_or_inf(losses[name]))
        test = trainer.evaluate_test(chosen == "averaged")
        return Outcome(test["loss"], test.get("accuracy"), losses[chosen], compute, wall, weights=chosen, **fields)


def candidates(weights: str) -> tuple[str, ...]:
    return ("raw", "averaged") if weights == "best" else (weights,)
