"""Automatic learning rates for people who train on Ray clusters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolrs_ray.core.policy import AutoLRSError
    from autolrs_ray.result import RunResult
    from autolrs_ray.runner import run
    from autolrs_ray.schedule import LearnedLRScheduler, LearnedSchedule
    from autolrs_ray.scheduler import AutoLRSScheduler
    from autolrs_ray.searcher import AutoLRSSearch
    from autolrs_ray.trainable import AutoLRSTrainable, lr_at, trainable_for
    from autolrs_ray.training import Trainer, TrainingTask, accuracy

_HOMES = {
    "AutoLRSError": "core.policy",
    "AutoLRSScheduler": "scheduler",
    "AutoLRSSearch": "searcher",
    "AutoLRSTrainable": "trainable",
    "LearnedLRScheduler": "schedule",
    "LearnedSchedule": "schedule",
    "RunResult": "result",
    "Trainer": "training",
    "TrainingTask": "training",
    "accuracy": "training",
    "lr_at": "trainable",
    "run": "runner",
    "trainable_for": "trainable",
}

__version__ = "0.1.0"
__all__ = [
    "AutoLRSError",
    "AutoLRSScheduler",
    "AutoLRSSearch",
    "AutoLRSTrainable",
    "LearnedLRScheduler",
    "LearnedSchedule",
    "RunResult",
    "Trainer",
    "TrainingTask",
    "accuracy",
    "lr_at",
    "run",
    "trainable_for",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: importing Ray and torch costs seconds
        return getattr(import_module(f"autolrs_ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
