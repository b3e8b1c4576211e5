"""Optimizers that claim to need no schedule, as methods of the comparison: Schedule-Free, ScheduleFree+ and Prodigy."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autolrs_ray.core.envelopes import envelope_factor
from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.training.trainer import Trainer
from experiments.compare_lab import Lab, Outcome
from experiments.compare_tasks import SCHEDULE_FREE_DEFAULT, SCHEDULE_FREE_GRID, WEIGHT_DECAY
from experiments.schedule_free_plus import ScheduleFreePlus


class AveragedPointTrainer(Trainer):
    """Schedule-Free: evaluated at the averaged point, batch-norm statistics re-estimated there on 50 batches."""

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        self.task.optimizer.train()  # type: ignore[attr-defined]
        return super().train(until, lr_at)

    def to_averaged_point(self) -> None:
        self.task.optimizer.eval()  # type: ignore[attr-defined]
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.model.train()
        with torch.no_grad():
            for step in range(50):
                self.model(self.batch(step)[0])


def _schedule_free(lab: Lab, lr: float) -> AveragedPointTrainer:
    import schedulefree

    def make(parameters: Any) -> torch.optim.Optimizer:
        kind, decay = lab.task.optimizer, WEIGHT_DECAY[lab.task.optimizer]
        warmup = lab.task.steps // 20  # the authors advise a warm-up of about 5 %
        if kind == "sgd":
            return schedulefree.SGDScheduleFree(
                parameters, lr=lr, momentum=0.9, weight_decay=decay, warmup_steps=warmup
            )
        return schedulefree.AdamWScheduleFree(parameters, lr=lr, weight_decay=decay, warmup_steps=warmup)

    trainer = AveragedPointTrainer(lambda: lab.task.build(lab.seed, make), lab.seed)
    trainer.train(lab.task.steps, lambda step: lr)
    trainer.to_averaged_point()
    return trainer


def schedule_free(lab: Lab, grid: list[float]) -> Outcome:
    found = {}
    for lr in grid:
        key = f"schedule-free/{lr!r}"
        if lab.memo.get(key) is None:
            lab.memo.put(key, _schedule_free(lab, lr).evaluate()["loss"])
        found[lr] = finite_or_inf(lab.memo.get(key))
    lr = min(found, key=lambda lr: found[lr])
    trainer = _schedule_free(lab, lr)
    test = trainer.evaluate(lab.test_data)
    extra = {"edge": len(grid) > 1 and lr in (grid[0], grid[-1])}
    return Outcome(test["loss"], test.get("accuracy"), found[lr], float(len(grid)), 1.0, lr, "averaged", extra)


def prodigy(lab: Lab) -> Outcome:
    """LR 1 under cosine decay, as its authors advise."""
    import prodigyopt

    decay = WEIGHT_DECAY[lab.task.optimizer]

    def make(parameters: Any) -> torch.optim.Optimizer:
        with redirect_stdout(io.StringIO()):  # it says which weight decay it uses, every time
            return prodigyopt.Prodigy(parameters, lr=1.0, weight_decay=decay)

    trainer = Trainer(lambda: lab.task.build(lab.seed, make), lab.seed)
    trainer.train(lab.task.steps, lambda step: envelope_factor("cosine", step, lab.task.steps))
    val, test = trainer.evaluate(), trainer.evaluate(lab.test_data)
    return Outcome(test["loss"], test.get("accuracy"), val["loss"], 1.0, 1.0, 1.0)


def schedule_free_plus(lab: Lab) -> Outcome:
    """At its defaults, with a warm-up of 5 % as for Schedule-Free; gradients as they are, since its step goes by their size."""
    seen: dict[str, Tensor] = {}

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen["loss"] = lab.task.loss(output, targets)
        return seen["loss"]

    task, warmup = replace(lab.task, loss=loss, clip_norm=None), lab.task.steps // 20

    def make(parameters: Any) -> torch.optim.Optimizer:
        return ScheduleFreePlus(parameters, lambda: float(seen["loss"]), warmup)

    trainer = AveragedPointTrainer(lambda: task.build(lab.seed, make), lab.seed)
    trainer.train(task.steps, lambda step: min(1.0, (step + 1) / warmup))
    trainer.to_averaged_point()
    val, test = trainer.evaluate(), trainer.evaluate(lab.test_data)
    return Outcome(test["loss"], test.get("accuracy"), val["loss"], 1.0, 1.0, None, "averaged")


def schedule_free_grid(lab: Lab) -> Outcome:
    return schedule_free(lab, SCHEDULE_FREE_GRID[lab.task.optimizer])


def schedule_free_default(lab: Lab) -> Outcome:
    return schedule_free(lab, [SCHEDULE_FREE_DEFAULT[lab.task.optimizer]])
