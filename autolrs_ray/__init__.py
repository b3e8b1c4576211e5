"""Automatic learning rates for people who train on Ray clusters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolrs_ray.core.policy import AutoLRSError
    from autolrs_ray.lr_range import LRRange, lr_range_test
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
    "LRRange": "lr_range",
    "LearnedLRScheduler": "schedule",
    "LearnedSchedule": "schedule",
    "RunResult": "result",
    "Trainer": "training",
    "TrainingTask": "training",
    "accuracy": "training",
    "lr_at": "trainable",
    "lr_range_test": "lr_range",
    "run": "runner",
    "trainable_for": "trainable",
}

# what the extra "tune" brings, and how to get it: the package is on no index
_TUNE = {"botorch", "gpytorch", "jinja2", "matplotlib", "ray", "rich", "tensorboardX", "typer"}

__version__ = "0.1.0"
INSTALL_TUNE = f"pip install '.[tune]' in a clone, or 'autolrs_ray-{__version__}-py3-none-any.whl[tune]' from a wheel"
__all__ = [
    "AutoLRSError",
    "AutoLRSScheduler",
    "AutoLRSSearch",
    "AutoLRSTrainable",
    "LRRange",
    "LearnedLRScheduler",
    "LearnedSchedule",
    "RunResult",
    "Trainer",
    "TrainingTask",
    "accuracy",
    "lr_at",
    "lr_range_test",
    "run",
    "trainable_for",
]


def lacks_tune(error: ModuleNotFoundError) -> bool:
    """True if what is missing is a package that the extra "tune" brings."""
    return (error.name or "").partition(".")[0] in _TUNE


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: importing Ray and torch costs seconds
        try:
            return getattr(import_module(f"autolrs_ray.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            if not lacks_tune(error):
                raise
            message = f"autolrs_ray.{name} needs {error.name}, which is not installed: {INSTALL_TUNE}"
            raise ImportError(message, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
